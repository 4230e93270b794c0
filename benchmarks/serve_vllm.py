"""An exported folder in real vLLM on a CPU: the loss on given tokens and a greedy continuation, as JSON.

Runs in an environment of its own, since vLLM 0.32 pins other versions than aqtx needs (CONTRIBUTING tells how to make
it). Nothing of aqtx is imported here.

    VLLM_PYTHON benchmarks/serve_vllm.py out/int4-compressed-tensors prompts.json result.json

prompts.json: {"prompts": [[ids], ...], "start": [ids], "new_tokens": 32, "dtype": "bfloat16"}. VLLM_CPU_INT4_W4A8=0
keeps the inputs of dense INT4 weights unrounded; for INT4 experts vLLM has only a kernel that rounds them to 8 bits.
"""

import argparse
import json
import os
import time
from pathlib import Path

_SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}


def serve(folder: Path, job: dict) -> dict:
    """Loss in nats per token, log-probabilities by prompt and the greedy continuation."""
    from vllm import LLM, SamplingParams

    begun = time.perf_counter()
    longest = max(len(ids) for ids in [*job["prompts"], job["start"] + [0] * job["new_tokens"]])
    dtype = job.get("dtype", "bfloat16")
    model = LLM(model=str(folder), dtype=dtype, enforce_eager=True, max_model_len=longest + 1, max_num_seqs=2)
    loaded = time.perf_counter() - begun
    scoring = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
    outputs = model.generate([{"prompt_token_ids": ids} for ids in job["prompts"]], scoring)
    scores = [
        [told[token].logprob for told, token in zip(output.prompt_logprobs[1:], ids[1:], strict=True)]
        for output, ids in zip(outputs, job["prompts"], strict=True)
    ]
    greedy = SamplingParams(max_tokens=job["new_tokens"], temperature=0, detokenize=False, ignore_eos=True)
    [made] = model.generate([{"prompt_token_ids": job["start"]}], greedy)
    count = sum(map(len, scores))
    loss = -sum(map(sum, scores)) / count
    told = {"loss": loss, "tokens": count, "scores": scores, "load_seconds": loaded}
    return {**told, "greedy": list(made.outputs[0].token_ids)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("result", type=Path)
    arguments = parser.parse_args()
    for key, value in _SETTINGS.items():
        os.environ.setdefault(key, value)
    result = serve(arguments.folder, json.loads(arguments.prompts.read_text()))
    arguments.result.write_text(json.dumps(result))
    print(f"{arguments.folder}: {result['loss']:.4f} nats per token on {result['tokens']} tokens")
