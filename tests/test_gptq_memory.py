"""A checkpoint four times larger than the memory that rounding it may take (slow: minutes, 9 GB of disk)."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from aqtx.checkpoint.open import trace
from aqtx.machine.memory import PeakMemory
from aqtx.passes.gptq import Gptq
from aqtx.registry import Context
from tests.tiny import OLMOE

LIMIT = 1_000_000_000
EXPERTS, SIZE = 64, 512
CONFIG = OLMOE | {
    "hidden_size": SIZE,
    "intermediate_size": SIZE,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 41,
    "num_key_value_heads": 4,
    "vocab_size": 512,
    "dtype": "bfloat16",
}


def write_large_checkpoint(folder: Path, config: dict) -> int:
    """Random weights, a shard a layer, one tensor per expert and projection; returns its bytes."""
    pool = (torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)) * 0.04).bfloat16()
    starts = itertools.count(0, 7919)  # no two matrices are cut from the pool at the same place

    def matrix(rows: int = SIZE, columns: int = SIZE) -> torch.Tensor:
        start = next(starts) % (len(pool) - rows * columns)
        return pool[start : start + rows * columns].view(rows, columns).clone()

    shards: dict[str, str] = {}

    def write(tensors: dict[str, torch.Tensor], name: str) -> None:
        save_file(tensors, folder / name, metadata={"format": "pt"})
        shards.update(dict.fromkeys(tensors, name))

    ones = torch.ones(SIZE).bfloat16()
    vocabulary = config["vocab_size"]
    outer = {"model.embed_tokens.weight": matrix(vocabulary), "lm_head.weight": matrix(vocabulary)}
    write({**outer, "model.norm.weight": ones}, "model-outer.safetensors")
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        tensors = {f"{prefix}.self_attn.{name}_proj.weight": matrix() for name in "qkvo"}
        tensors |= {f"{prefix}.self_attn.{name}_norm.weight": ones.clone() for name in "qk"}
        norms = ("input_layernorm", "post_attention_layernorm")
        tensors |= {f"{prefix}.{name}.weight": ones.clone() for name in norms}
        tensors[f"{prefix}.mlp.gate.weight"] = matrix(EXPERTS)
        for expert in range(EXPERTS):
            for name in ("gate", "up", "down"):
                tensors[f"{prefix}.mlp.experts.{expert}.{name}_proj.weight"] = matrix()
        write(tensors, f"model-{layer}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    (folder / "config.json").write_text(json.dumps(config))
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def child(checkpoint: str, work: str) -> None:
    """Round every expert, watched; prints the peak."""
    torch.set_num_threads(1)
    with PeakMemory() as peak:
        program = trace(checkpoint)
        for site in program.sites():
            if site.category.startswith("mlp"):
                site.set("format", "mxfp4")
        ids = torch.randint(0, 512, (8, 128), generator=torch.Generator().manual_seed(0))
        context = Context(quiet=True, work=Path(work), load_calibration=lambda: ids)
        changes = Gptq(max_memory=500_000_000, stream="disk", tokens_per_batch=512).run(program, context)
    sys.stdout.write(json.dumps({"peak": peak.num_bytes, "changed": len(changes.changed)}) + "\n")


def peak_of(folder: Path) -> dict[str, int]:
    (folder / "work").mkdir()
    command = [sys.executable, __file__, str(folder / "model"), str(folder / "work")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": "."})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_four_times_more_weights_than_memory(tmp_path) -> None:
    (tmp_path / "model").mkdir()
    assert write_large_checkpoint(tmp_path / "model", CONFIG) >= 4 * LIMIT
    found = peak_of(tmp_path)
    assert found["changed"] == 41 * EXPERTS * 3
    assert found["peak"] <= LIMIT


if __name__ == "__main__":
    child(*sys.argv[1:])
