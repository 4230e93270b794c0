"""The quickstart on checkpoints larger than the memory that it may use.

    python benchmarks/larger_than_memory.py make large /data/olmoe-random     # 13.8 GB, once
    python benchmarks/larger_than_memory.py make four-layers /data/olmoe-4    # 3.7 GB, the first four layers of it
    python benchmarks/larger_than_memory.py make small /data/small-random     # 0.85 GB
    python benchmarks/larger_than_memory.py run /data/small-random /data/out 1500MB
    python benchmarks/larger_than_memory.py run /data/small-random /data/out 1500MB router_only evaluate=null
    python benchmarks/larger_than_memory.py fisher /data/small-random 8
    python benchmarks/larger_than_memory.py text /data/small-random 64x64 700MB

`make` writes random weights, one tensor per expert and projection, bf16: in the shapes of OLMoE-1B-7B (64 experts, 16
layers), or 4 layers of 32 experts of 1024 x 1024. Text is read with the shipped model's tokenizer. `run` applies the
quickstart or another recipe, with overrides, under a limit (`none`: what is free), with evaluation on 20,000 tokens,
and samples the memory of the process that no file backs (RssAnon + RssShmem of /proc/self/status); mapped weights are
not counted: the kernel drops them whenever it likes.
`fisher` holds the CPU seconds of Fisher information, on so many sequences, against a plain forward and backward pass
of the same text with the whole model in memory. `text` lets the model write calibration text of its own, so many
sequences of so many tokens, and prints its digest.
"""

import argparse
import json
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from aqtx.checkpoint.locate import locate
from aqtx.checkpoint.shards import write_shards
from aqtx.machine.memory import PeakMemory, bytes_of, resident_bytes, room_for_work
from aqtx.models import build, load_config
from aqtx.program.names import NamesTable
from aqtx.runs.fingerprint import ids_hash
from aqtx.runs.memory_needs import Need
from aqtx.runs.recipe import load_recipe
from aqtx.runs.yaml_text import parse_overrides

LARGE = Path(__file__).parent / "configs" / "OLMoE-1B-7B" / "config.json"
SMALL = {"hidden_size": 1024, "intermediate_size": 1024, "num_experts": 32, "num_experts_per_tok": 8}
SMALL |= {"num_attention_heads": 8, "num_key_value_heads": 8}
POOL = 1 << 25  # random numbers that all matrices are cut from, at places of their own


def make(size: str, folder: Path) -> None:
    """Write the random checkpoint with a tokenizer."""
    folder.mkdir(parents=True)
    config: dict[str, Any] = load_config(locate("tinymoe")) | SMALL if size == "small" else load_config(LARGE.parent)
    if size == "four-layers":
        config["num_hidden_layers"] = 4
    write_shards(random_tensors(config), folder)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for file in locate("tinymoe").glob("tokenizer*"):
        shutil.copyfile(file, folder / file.name)


def random_tensors(config: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Gaussian matrices, gains of one; no two matrices are equal."""
    with torch.device("meta"):
        shapes = {name: tuple(parameter.shape) for name, parameter in build(config).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(POOL, generator=generator).mul_(0.02).to(torch.bfloat16)
    table = NamesTable(shapes)
    for key in table.from_disk:
        shape = torch.Size(table.matrix_shape(key))
        start = int(torch.randint(0, POOL - min(shape.numel(), POOL // 2), (), generator=generator))
        values = pool[start:].repeat(1 + shape.numel() // (POOL - start))[: shape.numel()]
        yield key, values.view(shape) if len(shape) > 1 else torch.ones(shape, dtype=torch.bfloat16)


class PeakDisk(PeakMemory):
    """The same of the bytes below a folder, looked at every second."""

    def __init__(self, folder: Path) -> None:
        super().__init__(every_seconds=1.0)
        self.folder, self.num_bytes = folder, 0

    def measure(self) -> int:
        """Bytes of all files, those that vanish meanwhile left out."""
        found = subprocess.run(["du", "-sb", str(self.folder)], capture_output=True, text=True, check=False)
        return int(found.stdout.split()[0]) if found.stdout else 0


def run(source: Path, output: Path, limit: str, name: str = "quickstart", changes: Sequence[str] = ()) -> None:
    """Apply a recipe and tell size, time and memory."""
    from aqtx.runs.apply import apply_recipe

    overrides: dict[str, Any] = {"model.source": str(source), "output": str(output), "report": False}
    overrides |= {"max_memory": None if limit == "none" else limit, "evaluate.max_tokens": 20_000}
    recipe = load_recipe(name, overrides | parse_overrides(changes))
    estimated: list[Need] = []
    started = time.perf_counter()
    with PeakMemory() as peak, PeakDisk(output.parent) as disk:
        report = apply_recipe(recipe, overwrite=True, tell=estimated.extend).data
    written = sum(file.stat().st_size for file in output.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    print(f"source {size / 1e9:.2f} GB, written {written / 1e9:.2f} GB")
    print(f"{report['average_bits']:.4f} bits a planned weight")
    stages: dict[str, Any] = {f"evaluate {moment}": told for moment, told in report["evaluations"].items()}
    stages |= {row["name"]: row for row in report["passes"]}
    for need in (row for row in estimated if row.stage in stages):
        told = stages[need.stage]
        seconds, measured = told["seconds"], told["peak_memory_bytes"]
        print(f"  {need.stage:<16}{seconds:>9.1f} s  {measured / 1e9:>6.2f} GB, estimated {need.peak / 1e9:.2f}")
    largest = max(need.peak for need in estimated)
    print(
        f"{time.perf_counter() - started:.0f} s in all; RssAnon + RssShmem at most {peak.num_bytes / 1e9:.2f} GB, "
        f"estimated {largest / 1e9:.2f} GB; disk below the output at most {disk.num_bytes / 1e9:.2f} GB"
    )
    if limit != "none" and peak.num_bytes > bytes_of(limit):
        raise SystemExit(f"more than the {limit} allowed")


def fisher(source: Path, num_sequences: int) -> None:
    """CPU seconds of Fisher information and of a plain forward and backward pass."""
    from aqtx.passes.annotate_fisher import AnnotateFisher
    from aqtx.runs.opening import program_of, recipe_context

    recipe = load_recipe("quickstart", {"model.source": str(source), "calibration.num_sequences": num_sequences})
    program = program_of(recipe)
    context = recipe_context(recipe, program)
    ids = context.calibration()
    module = program.module()
    for parameter in module.parameters():
        parameter.requires_grad_(True)
    module(ids[:1]).sum().backward()  # kernels are compiled, gradients have their place
    started = time.process_time()
    for batch in ids.split(8):
        logits = module(batch)[:, :-1].float().flatten(0, 1)
        cross_entropy(logits, batch[:, 1:].flatten(), reduction="sum").backward()
    plain = time.process_time() - started
    del module, logits
    started = time.process_time()
    AnnotateFisher(num_sequences=num_sequences, sites=("*",)).run(program, context)
    spent = time.process_time() - started
    print(f"Fisher {spent:.1f} CPU seconds, forward and backward {plain:.1f}: {spent / plain:.2f} times")


def text(source: Path, size: str, limit: str) -> None:
    """Seconds and memory of text that the model writes itself."""
    from aqtx.runs.memory_needs import Sizes, text_needs
    from aqtx.runs.opening import calibration_of, program_of, recipe_context

    count, length = map(int, size.split("x"))
    asked = {"source": "self", "num_sequences": count, "sequence_length": length}
    overrides = {f"calibration.{key}": value for key, value in asked.items()} | {"model.source": str(source)}
    recipe = load_recipe("quickstart", overrides | {"max_memory": None if limit == "none" else limit})
    program = program_of(recipe)
    context = recipe_context(recipe, program)
    [need] = text_needs(Sizes(program, resident_bytes(), room_for_work(program.device, recipe.memory_limit)), recipe)
    started = time.perf_counter(), time.process_time()
    with PeakMemory() as peak:
        ids = calibration_of(recipe, program, context).ids
    wall, cpu = time.perf_counter() - started[0], time.process_time() - started[1]
    print(f"{need.streams}; {wall:.0f} s, {cpu:.0f} CPU s, {cpu / length:.2f} CPU s a token of all sequences")
    print(f"RssAnon + RssShmem at most {peak.num_bytes / 1e9:.2f} GB, estimated {need.peak / 1e9:.2f} GB, ", end="")
    print(f"{need.disk / 1e9:.2f} GB of disk; text {ids_hash(ids)[:16]}")


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("make", "run", "fisher", "text"))
    parser.add_argument("words", nargs="+")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    words: list[str] = arguments.words
    if arguments.command == "make":
        make(words[0], Path(words[1]))
    elif arguments.command == "run":
        run(Path(words[0]), Path(words[1]), *(words[2:4] or ["4GB"]), changes=words[4:])
    elif arguments.command == "text":
        text(Path(words[0]), words[1], words[2])
    else:
        fisher(Path(words[0]), int(words[1]))


if __name__ == "__main__":
    main()
