"""Time of a linear by format and batch, against bf16 and other libraries' packed kernels, pairwise in one run.

    python benchmarks/linear.py                        # every format, M = 1, 4, 16, 256
    python benchmarks/linear.py --plain mxfp4 int4 int8  # the same without the compiled kernel

Each row is one compiled graph of 8 different weights, the peers' compiled alike. Sets of 8 weights are
called in rotation, more of them than the caches hold, so that weights stream from memory as in decoding.
All rows take turns within a round; a row's figure is the median over rounds of CPU time per linear
(process time, one thread), and its ratio the median over rounds of the time of bf16 in the same round
divided by its own, so that a busy machine slows both.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import Any

os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F
from torch import Tensor

GRAPH_WEIGHTS = 8
MIN_STREAMED_BYTES = 96 << 20
Apply = Callable[[Tensor, Any], Tensor]


@dataclass
class Row:
    """One line of the table: how a weight is stored and multiplied."""

    name: str
    store: Callable[[Tensor], Any]
    apply: Apply
    bits: float
    batches: tuple[int, ...] = (1, 4, 16, 256)
    freeze: bool = False


def format_rows(names: list[str], shape: tuple[int, int]) -> list[Row]:
    """Our formats."""
    from aqtx.formats import parse, quantize

    def row(name: str) -> Row:
        return Row(name, lambda weight: quantize(weight, name), F.linear, parse(name).bits(shape))

    return [row(name) for name in names]


def peer_rows(size: int) -> list[Row]:
    """bf16, prepacked bf16, aten's int4 and int8 kernels, torchao's MXFP4."""
    aten = torch.ops.aten

    def int4(weight: Tensor) -> tuple[Tensor, Tensor]:
        codes = torch.randint(0, 16, weight.shape, dtype=torch.int32)
        return aten._convert_weight_to_int4pack_for_cpu(codes, 1), torch.ones(size // 32, size, 2, dtype=torch.bfloat16)

    def int8(weight: Tensor) -> tuple[Tensor, Tensor]:
        return torch.randint(-127, 127, weight.shape, dtype=torch.int8), torch.ones(size, dtype=torch.bfloat16)

    return [
        Row("bf16", lambda weight: weight.clone(), F.linear, 16),
        Row("bf16 prepacked", lambda weight: weight.clone(), F.linear, 16, freeze=True),
        Row("aten int4pack g32", int4, lambda x, w: aten._weight_int4pack_mm_for_cpu(x, w[0], 32, w[1]), 5),
        Row("aten int8pack row", int8, lambda x, w: aten._weight_int8pack_mm(x, w[0], w[1]), 8),
        Row("torchao MXFP4", torchao_mxfp4, lambda x, w: F.linear(x, dequantize_mxfp4(*w)), 4.25, (1,)),
    ]


def torchao_mxfp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of torchao's MXTensor."""
    from torch._inductor.codegen import cpp_utils
    from torchao.prototype.mx_formats.mx_tensor import to_mx

    cpp_utils.DTYPE_TO_CPP[torch.float8_e8m0fnu] = "at::Float8_e8m0fnu"  # Inductor's C++ backend does not know it
    scale, data = to_mx(weight, torch.float4_e2m1fn_x2, 32)
    return data, scale.view(torch.uint8)


def dequantize_mxfp4(data: Tensor, scale: Tensor) -> Tensor:
    """What MXTensor.dequantize does, which its linear needs on a CPU."""
    from torchao.prototype.mx_formats.mx_tensor import to_dtype

    return to_dtype(data, scale, torch.float4_e2m1fn_x2, 32, torch.bfloat16)


def compiled_sets(row: Row, sets: list[list[Any]]) -> list[Callable[[Tensor], Tensor]]:
    """A callable per set of weights, all running one compiled graph of 8 products, summed."""

    def graph(x: Tensor, weights: list[Any]) -> Tensor:
        total = row.apply(x, weights[0])
        for weight in weights[1:]:
            total = total + row.apply(x, weight)
        return total

    if not row.freeze:
        # a code object of its own: Dynamo keeps what it compiled, and its limit, by code object
        own = FunctionType(graph.__code__.replace(co_name=row.name), globals(), row.name, None, graph.__closure__)
        run = torch.compile(own, fullgraph=True)
        return [partial(run, weights=weights) for weights in sets]
    return [frozen(graph, weights) for weights in sets]  # weights become constants, so each set has its graph


def frozen(graph: Callable[[Tensor, list[Any]], Tensor], weights: list[Any]) -> Callable[[Tensor], Tensor]:
    """Compiled so that Inductor prepacks the weights for oneDNN."""
    module = torch.nn.Module()
    held = torch.nn.ParameterList(torch.nn.Parameter(weight, requires_grad=False) for weight in weights)
    module.held = held
    module.forward = lambda x: graph(x, list(held))
    return torch.compile(module.eval(), fullgraph=True, options={"freezing": True})


def weight_sets(row: Row, size: int) -> list[list[Any]]:
    """Sets of 8 weights that together are larger than the caches."""
    set_bytes = int(GRAPH_WEIGHTS * size * size * row.bits / 8)
    num_sets = max(2, -(-MIN_STREAMED_BYTES // set_bytes))
    weight = torch.randn(size, size, dtype=torch.bfloat16)
    return [[row.store(weight.roll(index)) for index in range(GRAPH_WEIGHTS)] for _ in range(num_sets)]


def read_bandwidth() -> float:
    """Bytes per second that one thread reads, by a dot product over 256 MB."""
    a = torch.ones(1 << 26)
    times = []
    for _ in range(7):
        start = time.process_time()
        torch.dot(a, a)
        times.append(time.process_time() - start)
    return a.numel() * 4 / min(times)


def measure(rows: list[Row], size: int, batch: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of CPU time per linear, by row, one figure per round."""
    x = torch.randn(batch, size, dtype=torch.bfloat16)
    ready = []
    for row in rows:
        graphs = compiled_sets(row, weight_sets(row, size))
        for graph in graphs:
            graph(x)
        ready.append((row, graphs))
    times: dict[str, list[float]] = {row.name: [] for row in rows}
    for _ in range(rounds):
        for row, graphs in ready:
            start = time.process_time()
            for graph in graphs:
                graph(x)
            times[row.name].append((time.process_time() - start) / (len(graphs) * GRAPH_WEIGHTS))
    return times


def main() -> None:
    """Measure and print."""
    from aqtx.formats import names

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("formats", nargs="*", help="default: every format of the table")
    parser.add_argument("--batches", default="1,4,16,256", help="rows of activations, a comma list")
    parser.add_argument("--size", type=int, default=2048, help="rows and columns of the weight")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--without", nargs="*", default=[], help="peers to leave out, by name")
    parser.add_argument("--plain", action="store_true", help="without the compiled kernel")
    arguments = parser.parse_args()
    if arguments.plain:
        os.environ["AQTX_KERNEL"] = "off"
    torch.set_num_threads(1)
    wanted = arguments.formats or [name for name in names() if name != "bf16"] + ["int4_g32", "int4_asym", "int8_row"]
    rows = peer_rows(arguments.size) + format_rows(wanted, (arguments.size, arguments.size))
    rows = [row for row in rows if row.name not in arguments.without]
    print(f"{arguments.size} x {arguments.size}, one thread, us of CPU time per linear (times bf16's speed); "
          f"memory is read at {read_bandwidth() / 1e9:.1f} GB/s")  # fmt: skip
    for batch in map(int, arguments.batches.split(",")):
        present = [row for row in rows if batch in row.batches]
        with torch.no_grad():
            times = measure(present, arguments.size, batch, arguments.rounds if batch < 64 else 3)
        for row in present:
            ratio = statistics.median(b / t for b, t in zip(times["bf16"], times[row.name], strict=True))
            micros = 1e6 * statistics.median(times[row.name])
            speed = row.bits / 8 * arguments.size**2 / statistics.median(times[row.name]) / 1e9
            print(f"M={batch:<4d} {row.name:20s} {micros:9.0f} us  {ratio:5.2f}x  {speed:5.1f} GB/s", flush=True)
        torch._dynamo.reset()


if __name__ == "__main__":
    main()
