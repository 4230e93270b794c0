"""One program with one exported model, timed: the worker of `benchmarks/deploy_cost.py`, which starts it.

    PYTHON benchmarks/deploy_workers.py vllm FOLDER PROMPT TOKENS ROUNDS

Prints JSON: CPU seconds from the start of the process until the model has read its first prompt, of reading PROMPT
tokens and of making TOKENS behind 16 (a list each), and the largest memory the process had. Imports nothing of aqtx
but for `torch.compile`, so that it runs where only the program itself is installed.
"""

import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Protocol

BEHIND = 16


def counting(count: int) -> list[int]:
    """Token ids below 100, which every vocabulary has."""
    return [token % 100 for token in range(count)]


class Worker(Protocol):
    """A loaded model. `decode` is None where the program only reads whole sequences."""

    def prefill(self, count: int) -> float:
        """CPU seconds of reading `count` tokens."""

    decode: Any


class Vllm:
    """vLLM's engine in this process. What it takes to make one token is taken off what it takes to make more."""

    def __init__(self, folder: Path, slots: int) -> None:
        os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
        from vllm import LLM

        keys = {"max_model_len": slots, "max_num_seqs": 2, "max_num_batched_tokens": slots}
        self.model = LLM(str(folder), dtype="bfloat16", enable_prefix_caching=False, **keys)

    def run(self, ids: list[int], count: int) -> float:
        """CPU seconds of making `count` tokens behind a prompt."""
        from vllm import SamplingParams

        settings = SamplingParams(max_tokens=count, temperature=0, detokenize=False, ignore_eos=True)
        began = time.process_time()
        self.model.generate([{"prompt_token_ids": ids}], settings, use_tqdm=False)
        return time.process_time() - began

    def prefill(self, count: int) -> float:
        """A prompt and one token."""
        return self.run(counting(count), 1)

    def decode(self, count: int) -> float:
        """Tokens behind a prompt, less the prompt and the first."""
        return self.run(counting(BEHIND), count + 1) - self.run(counting(BEHIND), 1)


class Transformers:
    """transformers with compressed-tensors, which decompresses weights when they are first used."""

    def __init__(self, folder: Path, slots: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.torch, self.model = torch, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)

    def read(self, ids: list[int], cache: Any) -> Any:
        """The likeliest next token and the cache."""
        with self.torch.no_grad():
            out = self.model(self.torch.tensor([ids]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        return int(out.logits[0, -1].argmax()), out.past_key_values

    def prefill(self, count: int) -> float:
        """A prompt."""
        began = time.process_time()
        self.read(counting(count), None)
        return time.process_time() - began

    def decode(self, count: int) -> float:
        """Tokens one by one."""
        token, cache = self.read(counting(BEHIND), None)
        began = time.process_time()
        for _ in range(count):
            token, cache = self.read([token], cache)
        return time.process_time() - began


class Package:
    """`aqtx package`'s file in plain torch, as `recipes/README.md` shows."""

    def __init__(self, folder: Path, slots: int) -> None:
        import torch

        self.torch = torch
        kernel = folder / "model.kernel.so"
        if kernel.exists():
            torch.ops.load_library(str(kernel))
        self.step = torch._inductor.aoti_load_package(str(folder / "model.pt2"))
        self.cache = [
            torch.zeros(1, *(slots if n == "slots" else int(n) for n in sizes.split()[1:]), dtype=torch.bfloat16)
            for sizes in self.step.get_metadata()["caches"].split("; ")
        ]

    def read(self, ids: list[int], at: int) -> int:
        """The likeliest next token."""
        torch = self.torch
        places, start = torch.arange(at, at + len(ids)), torch.zeros(1, dtype=torch.long)
        return int(self.step(torch.tensor([ids]), places, start, self.cache)[0, -1].argmax())

    def prefill(self, count: int) -> float:
        """A prompt."""
        began = time.process_time()
        self.read(counting(count), 0)
        return time.process_time() - began

    def decode(self, count: int) -> float:
        """Tokens one by one."""
        token = self.read(counting(BEHIND), 0)
        began = time.process_time()
        for at in range(BEHIND, BEHIND + count):
            token = self.read([token], at)
        return time.process_time() - began


class Compiled:
    """`torch.compile` of the folder that `aqtx apply` wrote, as the README shows: whole sequences, no cache."""

    decode = None

    def __init__(self, folder: Path, slots: int) -> None:
        import torch

        import aqtx

        self.torch = torch
        self.model = torch.compile(aqtx.load(folder).module(), fullgraph=True, dynamic=True)

    def prefill(self, count: int) -> float:
        """All logits of a text."""
        began = time.process_time()
        with self.torch.no_grad():
            self.model(self.torch.tensor([counting(count)]))
        return time.process_time() - began


def llama_cpp(file: Path, slots: int) -> Worker:
    """llama.cpp on one thread."""
    from llama_cpp_speed import Worker as LlamaCpp

    return LlamaCpp(str(file), 1, slots)


PROGRAMS = {
    "vllm": Vllm,
    "transformers": Transformers,
    "llama.cpp": llama_cpp,
    "package": Package,
    "torch.compile": Compiled,
}


def peak() -> int:
    """The largest memory of this program in bytes; `ru_maxrss` would count the process that started it too."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def main() -> None:
    """Load, measure, tell."""
    name, place, prompt, tokens, rounds = sys.argv[1:]
    worker: Worker = PROGRAMS[name](Path(place), max(int(prompt), BEHIND + int(tokens)) + 1)
    worker.prefill(int(prompt))
    used = os.times()
    told: dict[str, Any] = {"ready": used.user + used.system + used.children_user + used.children_system}
    told["prefill"] = statistics.median(worker.prefill(int(prompt)) for _ in range(int(rounds)))
    if worker.decode is not None:
        worker.decode(2)
        told["decode"] = statistics.median(worker.decode(int(tokens)) for _ in range(int(rounds)))
    told["memory"] = peak()
    print("\n" + json.dumps(told))


if __name__ == "__main__":
    main()
