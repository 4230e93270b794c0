"""Tokens per second of compiled greedy decoding, end to end: bf16 against packed formats.

    python benchmarks/generate.py                       # tinymoe
    python benchmarks/generate.py out/smollm2           # a folder, here what benchmarks/smollm2.py writes
    python benchmarks/generate.py tinymoe --formats mxfp4 int4 int8

One sequence, one token a step, the `step` graph compiled with a cache of fixed size; every site but the
routers is packed, the head included (a tied head is untied). The models take turns within a round; a row's figure
is the median over rounds of CPU time (one thread), so that other work on the machine is left out.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")

import torch
from torch import Tensor

CACHE_SLOTS = 256
PROMPT = 16

Decode = Callable[[int], float]


def decoder(source: str, format_name: str) -> tuple[Decode, int]:
    """(a function that decodes n tokens and returns its CPU seconds, bytes of the weights)."""
    import aqtx
    from aqtx.passes.assign_plan import AssignPlan
    from aqtx.passes.emit import Emit
    from aqtx.passes.quantize import Quantize
    from aqtx.program.generate import Generator

    program = aqtx.trace(source, dtype=torch.bfloat16)
    if format_name != "bf16":
        plan = AssignPlan(method="uniform", candidates=(format_name,), keep=("router",))
        program = aqtx.run(program, [plan, Quantize(), Emit()])
    step = program.module("step")
    size = sum(getattr(part, "num_bytes", part.numel() * part.element_size()) for part in step.parameters())
    caches = Generator(program).make_cache(1, CACHE_SLOTS)
    start = torch.zeros(1, dtype=torch.long)
    compiled = torch.compile(step, fullgraph=True)

    @torch.no_grad()
    def decode(num_tokens: int) -> float:
        ids: Tensor = torch.arange(PROMPT)[None] % 100
        logits = step(ids, torch.arange(PROMPT), start, caches)
        began = time.process_time()
        for position in range(PROMPT, PROMPT + num_tokens):
            ids = logits[:, -1].argmax(-1, keepdim=True)
            logits = compiled(ids, torch.tensor([position]), start, caches)
        return time.process_time() - began

    decode(4)
    return decode, size


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="tinymoe")
    parser.add_argument("--formats", nargs="+", default=["mxfp4", "int4"])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    names = ["bf16", *arguments.formats]
    ready = {name: decoder(arguments.model, name) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(arguments.rounds):
        for name, (decode, _) in ready.items():
            seconds[name].append(decode(arguments.tokens))
    print(f"{arguments.model}: {arguments.tokens} tokens, one sequence, one thread, compiled")
    for name, (_, size) in ready.items():
        speed = arguments.tokens / statistics.median(seconds[name])
        ratio = statistics.median(b / t for b, t in zip(seconds["bf16"], seconds[name], strict=True))
        print(f"{name:12s} {speed:8.1f} tokens/s  {ratio:5.2f}x bf16  {size / 1e6:8.1f} MB of weights")


if __name__ == "__main__":
    main()
