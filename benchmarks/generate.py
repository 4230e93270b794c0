"""Tokens per second of greedy decoding and of reading a prompt, end to end: bf16, packed formats, and llama.cpp.

    python benchmarks/generate.py                       # tinymoe
    python benchmarks/generate.py out/smollm2           # a folder, here what benchmarks/smollm2.py writes
    python benchmarks/generate.py tinymoe --formats bf16 mxfp4 int4 int8
    python benchmarks/generate.py tinymoe --llamacpp python --threads 2

One sequence, the `step` entry as `aqtx package` compiles it; every site but the routers is packed, the head included (a
tied head is untied). With `--llamacpp` the same codes, exported as GGUF, run in llama.cpp in another process, on that
Python's `xllamacpp` wheel. All take turns within a round. A row's figure is the median over rounds of CPU time, so that
other work on the machine is left out.
"""

import argparse
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")

import torch
from torch import Tensor

PROMPT = 16

Timed = Callable[[int], float]  # a number of tokens -> CPU seconds


@dataclass(frozen=True)
class Contender:
    """One way to run the model."""

    decode: Timed
    prefill: Timed
    bytes: int


def quantized_folder(source: str, format_name: str, folder: Path) -> Path:
    """`source` with every site but the routers in a format, as a checkpoint."""
    import aqtx
    from aqtx.passes.assign_plan import AssignPlan
    from aqtx.passes.emit import Emit
    from aqtx.passes.quantize import Quantize

    program = aqtx.trace(source, dtype=torch.bfloat16)
    if format_name != "bf16":
        plan = AssignPlan(method="uniform", candidates=(format_name,), keep=("router",))
        program = aqtx.run(program, [plan, Quantize(), Emit()])
    aqtx.save(program, folder)
    return folder


def ours(folder: Path, slots: int) -> Contender:
    """The package of a folder."""
    from aqtx.checkpoint.open import open_program
    from aqtx.program.ahead_of_time import compile_entry
    from aqtx.program.generate import Generator
    from aqtx.program.package import open_package

    program, file = open_program(folder, None), folder / "model.pt2"
    compile_entry(program, "step", file, {})
    package = open_package(file)
    cache = Generator.over(package).make_cache(1, slots)
    start = torch.zeros(1, dtype=torch.long)

    def prefill(num_tokens: int) -> float:
        ids, places = torch.arange(num_tokens)[None] % 100, torch.arange(num_tokens)
        began = time.process_time()
        package.step(ids, places, start, cache)[:, -1].argmax(-1)
        return time.process_time() - began

    def decode(num_tokens: int) -> float:
        logits = package.step(torch.arange(PROMPT)[None], torch.arange(PROMPT), start, cache)
        began = time.process_time()
        for position in range(PROMPT, PROMPT + num_tokens):
            ids: Tensor = logits[:, -1].float().argmax(-1, keepdim=True)
            logits = package.step(ids, torch.tensor([position]), start, cache)
        return time.process_time() - began

    return Contender(decode, prefill, file.stat().st_size)


def llama_cpp(python: str, folder: Path, slots: int, threads: int) -> Contender:
    """The same codes as GGUF in llama.cpp."""
    from aqtx.checkpoint.exports.run import export

    file = export(folder, "gguf", folder / "model.gguf", verify=False).path
    script = Path(__file__).with_name("llama_cpp_speed.py")
    worker = subprocess.Popen(
        [python, str(script), str(file), str(threads), str(slots)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert worker.stdin is not None and worker.stdout is not None
    orders, answers = worker.stdin, worker.stdout
    assert answers.readline() == "ready\n", f"{python} does not run {script}"

    def ordered(order: str) -> Timed:
        def timed(num_tokens: int) -> float:
            orders.write(f"{order} {num_tokens}\n")
            orders.flush()
            return float(answers.readline())

        return timed

    return Contender(ordered("decode"), ordered("prefill"), file.stat().st_size)


def contenders(arguments: argparse.Namespace, work: Path) -> dict[str, Contender]:
    """All ways to run the model, by name."""
    slots = max(arguments.prefill, PROMPT + arguments.tokens)
    ready = {}
    for name in arguments.formats:
        folder = quantized_folder(arguments.model, name, work / name)
        ready[name] = ours(folder, slots)
        if arguments.llamacpp and name != "bf16":
            ready[f"{name} llama.cpp"] = llama_cpp(arguments.llamacpp, folder, slots, arguments.threads)
    return ready


@torch.no_grad()
def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="tinymoe")
    parser.add_argument("--formats", nargs="+", default=["bf16", "mxfp4", "int4"])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--llamacpp", metavar="PYTHON", help="a Python that has xllamacpp, llama-cpp-py-sync and cffi")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as work:
        ready = contenders(arguments, Path(work))
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in ready}
        for contender in ready.values():
            contender.decode(4), contender.prefill(arguments.prefill)
        for _ in range(arguments.rounds):
            for name, contender in ready.items():
                times[name].append((contender.decode(arguments.tokens), contender.prefill(arguments.prefill)))
    first = times[arguments.formats[0]]
    print(f"{arguments.model}: one sequence, {arguments.threads} threads, tokens per CPU second, and over the first's")
    for name, contender in ready.items():
        told = []
        for which, count in enumerate((arguments.tokens, arguments.prefill)):
            seconds = [pair[which] for pair in times[name]]
            ratio = statistics.median(b[which] / t for b, t in zip(first, seconds, strict=True))
            told.append(f"{count / statistics.median(seconds):9.1f} {ratio:6.2f}x")
        print(f"{name:18s} decode {told[0]}  prefill {told[1]}  {contender.bytes / 1e6:8.1f} MB")


if __name__ == "__main__":
    main()
