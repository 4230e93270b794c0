"""Speed of round-to-nearest of a [64, 1024, 2048] bf16 stack of experts to MXFP4, against torchao and memcpy.

    python benchmarks/quantize_speed.py             # 2 threads; --experts 8 for a smaller stack

Prints GB of input per second of wall time, of the best of several rounds that take turns, checks that
codes and scales are equal bit for bit, and states the share of memcpy's speed (bytes of input copied).
"""

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")

import torch
from torch import Tensor


def compiled_to_mx() -> Callable[[Tensor], Any]:
    """torchao's conversion under torch.compile."""
    from torch._inductor.codegen import cpp_utils
    from torchao.prototype.mx_formats.mx_tensor import to_mx

    cpp_utils.DTYPE_TO_CPP[torch.float8_e8m0fnu] = "at::Float8_e8m0fnu"  # Inductor's C++ backend does not know it
    return torch.compile(lambda weight: to_mx(weight, torch.float4_e2m1fn_x2, 32), fullgraph=True)


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """(seconds, result)."""
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def main() -> None:
    """Measure and print."""
    from aqtx.formats import QuantizedTensor, quantize

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    weight = torch.randn(arguments.experts, 1024, 2048, dtype=torch.bfloat16)
    target = torch.empty_like(weight)
    to_mx = compiled_to_mx()
    to_mx(weight[:1].contiguous())
    to_mx(weight[:2].contiguous())
    runs: dict[str, Callable[[], Any]] = {
        "aqtx quantize": lambda: quantize(weight, "mxfp4"),
        "torchao to_mx, compiled": lambda: to_mx(weight),
        "memcpy": lambda: target.copy_(weight),
    }
    for run in runs.values():
        run()
    best: dict[str, float] = dict.fromkeys(runs, float("inf"))
    results: dict[str, Any] = {}
    for _ in range(arguments.rounds):
        for name, run in runs.items():
            seconds, results[name] = timed(run)
            best[name] = min(best[name], seconds)
    ours: QuantizedTensor = results["aqtx quantize"]
    scale, codes = results["torchao to_mx, compiled"]
    assert torch.equal(ours.to_disk()["qdata"], codes.view(torch.uint8)), "codes differ"
    assert ours.scale is not None and torch.equal(ours.scale, scale.view(torch.uint8)), "scales differ"
    size = weight.numel() * weight.element_size()
    print(f"{list(weight.shape)} bf16 to MXFP4, {arguments.threads} threads; bit-equal")
    for name, seconds in best.items():
        print(f"{name:24s} {size / seconds / 1e9:7.2f} GB/s of input")
    ratio = best["torchao to_mx, compiled"] / best["aqtx quantize"]
    print(f"{ratio:.1f} times torchao's speed, {best['memcpy'] / best['aqtx quantize']:.0%} of memcpy's")


if __name__ == "__main__":
    main()
