"""The same run on one process and on several: seconds of each pass, and how far the weights differ.

    python -m benchmarks.scale_out --ranks 2 --work out/scale_out

One thread a process. The checkpoint is random in the shapes of a small OLMoE (4 layers of 32 experts, hidden 512),
calibrated on shipped text.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import aqtx
from aqtx.checkpoint.locate import locate
from aqtx.checkpoint.shards import write_shards
from aqtx.formats import QuantizedTensor
from aqtx.models import load_config
from benchmarks.larger_than_memory import random_tensors

SIZES = {
    "hidden_size": 512,
    "intermediate_size": 512,
    "num_experts": 32,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}
PASSES = [
    {"annotate_alpha": {}},
    {"assign_plan": {"method": "alpha", "candidates": ["mxfp4", "mxfp6"], "average_bits": 5.0}},
    "gptq",
    "emit",
]


def make(folder: Path) -> None:
    """Write the random checkpoint with the shipped tokenizer, once."""
    if folder.exists():
        return
    shipped = locate("tinymoe")
    config = load_config(shipped) | SIZES
    folder.mkdir(parents=True)
    write_shards(random_tensors(config), folder)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(shipped / name, folder / name)


def run(ranks: int, recipe: Path, output: Path) -> dict[str, Any]:
    """`aqtx apply` on so many processes; its report."""
    words = ["-m", "aqtx", "apply", str(recipe), f"output={output}", "--overwrite"]
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *(launcher if ranks > 1 else []), *words], env=environment, check=True)
    report: dict[str, Any] = json.loads((output / "report.json").read_text())
    return report


def differing(one: Path, other: Path) -> float:
    """The share of weights that the two runs rounded differently."""
    first, second = (aqtx.load(folder) for folder in (one, other))
    unequal = total = 0
    for a, b in zip(first.sites(), second.sites(), strict=True):
        W, V = (plain(program.read(site)) for program, site in ((first, a), (second, b)))
        unequal += int((W != V).sum())
        total += W.numel()
    return unequal / total


def plain(matrix: Any) -> torch.Tensor:
    """The values of a matrix, quantized or not."""
    values: torch.Tensor = matrix.dequantize() if isinstance(matrix, QuantizedTensor) else matrix
    return values


def main() -> None:
    """Run both, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("out/scale_out"))
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    make(arguments.work / "model")
    calibration = {"source": "builtin", "num_sequences": 64, "sequence_length": 256}
    recipe = {"version": 1, "model": {"source": str(arguments.work / "model")}, "calibration": calibration}
    file = arguments.work / "recipe.json"  # JSON is YAML
    file.write_text(json.dumps({**recipe, "passes": PASSES, "report": False}))
    folders = {ranks: arguments.work / f"on-{ranks}" for ranks in (1, arguments.ranks)}
    one, many = (run(ranks, file, folder) for ranks, folder in folders.items())
    print(f"{'pass':<16}{'1 rank':>10}{f'{arguments.ranks} ranks':>10}{'ratio':>8}")
    rows = [(a["name"], a["seconds"], b["seconds"]) for a, b in zip(one["passes"], many["passes"], strict=True)]
    for name, before, after in [*rows, ("whole run", one["seconds"], many["seconds"])]:
        print(f"{name:<16}{before:>8.1f} s{after:>8.1f} s{before / max(after, 1e-9):>8.2f}")
    print(f"{differing(*folders.values()):.2e} of the weights differ")


if __name__ == "__main__":
    main()
