"""Alpha, plan and round-to-nearest on a checkpoint larger than the memory they may use.

    python benchmarks/larger_than_memory.py make /data/olmoe-random          # 13.8 GB, once
    python benchmarks/larger_than_memory.py run /data/olmoe-random /data/out

`make` writes random weights in the shapes of OLMoE-1B-7B (64 experts, 16 layers, bf16, sharded, one
tensor per expert and projection). `run` applies a recipe to it and samples the memory of the process
that no file backs (RssAnon + RssShmem of /proc/self/status); mapped weights are not counted, since
the kernel drops them whenever it likes.
"""

import argparse
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from aqtx.checkpoint.shards import write_shards
from aqtx.models import build, load_config
from aqtx.program.names import NamesTable

CONFIG = Path(__file__).parent / "configs" / "OLMoE-1B-7B" / "config.json"
POOL = 1 << 25  # random numbers that all matrices are cut from, at places of their own
LIMIT_BYTES = 3e9
RECIPE = {
    "version": 1,
    "seed": 0,
    "passes": [
        {"annotate_alpha": {"spectra": "farms", "raw": False}},
        {
            "assign_plan": {
                "method": "alpha",
                "candidates": ["mxfp4", "mxfp6", "mxfp8"],
                "average_bits": 5.0,
                "keep": ["attention", "router", "lm_head"],
            }
        },
        "quantize",
        "emit",
    ],
    "report": False,
}


def make(folder: Path) -> None:
    """Write the random checkpoint."""
    folder.mkdir(parents=True)
    config = load_config(CONFIG.parent)
    write_shards(random_tensors(config), folder)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def random_tensors(config: dict[str, object]) -> Iterator[tuple[str, Tensor]]:
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


class MemoryWatch(threading.Thread):
    """Samples this process's memory that no file backs, and keeps the largest."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0

    def run(self) -> None:
        """Sample twenty times a second until the process ends."""
        while True:
            status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            self.peak = max(self.peak, sum(int(status[key].split()[0]) for key in ("RssAnon", "RssShmem")) * 1024)
            time.sleep(0.05)


def run(source: Path, output: Path) -> None:
    """Apply the recipe and tell size, time and memory."""
    import aqtx

    watch = MemoryWatch()
    watch.start()
    started = time.perf_counter()
    report = aqtx.apply({**RECIPE, "model": {"source": str(source)}, "output": str(output)}, overwrite=True).data
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    written = sum(file.stat().st_size for file in output.glob("*.safetensors"))
    print(f"source {size / 1e9:.2f} GB, written {written / 1e9:.2f} GB")
    print(f"{report['average_bits']:.4f} bits a planned weight")
    for row in report["passes"]:
        print(f"  {row['name']:<16}{row['seconds']:>9.1f} s")
    print(f"{time.perf_counter() - started:.0f} s in all, RssAnon + RssShmem at most {watch.peak / 1e9:.2f} GB")
    if watch.peak >= LIMIT_BYTES:
        raise SystemExit(f"more than the {LIMIT_BYTES / 1e9:.0f} GB allowed")


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("make", "run"))
    parser.add_argument("folders", nargs="+", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    {"make": make, "run": run}[arguments.command](*arguments.folders)


if __name__ == "__main__":
    main()
