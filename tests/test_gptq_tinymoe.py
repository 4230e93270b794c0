"""The shipped model at few calibration tokens: shrinkage against plain damping, in held-out loss (slow: a minute)."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from aqtx import models
from aqtx.passes.gptq import Gptq
from aqtx.program import Program
from aqtx.registry import Context
from aqtx.text import CalibrationSpec, calibration, evaluation, load_tokenizer
from aqtx.tracing import trace

FOLDER = Path(models.__file__).parent / "tinymoe"
LENGTH = 128


def rounded(ids: torch.Tensor, prior: str) -> tuple[Program, list[int]]:
    """All experts at 2 bits, and the tokens that each saw."""
    program = trace(FOLDER)
    for site in program.sites():
        if site.category in ("mlp_gate", "mlp_up", "mlp_down"):
            site.set("format", "int2")
    changes = Gptq(prior=prior).run(program, Context(quiet=True, load_calibration=lambda: ids))
    return program, [row["tokens"] for row in changes.details["sites"]]


@torch.no_grad()
def loss(program: Program, ids: torch.Tensor) -> float:
    """Nats per token."""
    module = program.module()
    logits = torch.cat([module(batch).float() for batch in ids.split(8)])
    return float(F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))


@pytest.mark.slow
def test_shrinkage_beats_plain_damping_where_experts_starve() -> None:
    tokenizer = load_tokenizer(FOLDER)
    few = calibration(CalibrationSpec(num_sequences=2, sequence_length=LENGTH), tokenizer)
    documents = evaluation("builtin", tokenizer)
    held_out = torch.stack([document.ids[:LENGTH] for document in documents if len(document.ids) >= LENGTH])
    plain, tokens = rounded(few, "none")
    shrunk, _ = rounded(few, "pooled")
    assert sum(count < 20 for count in tokens) >= 5  # several experts are nearly empty
    losses = [loss(program, held_out) for program in (trace(FOLDER), shrunk, plain)]
    assert losses[0] < losses[1] < losses[2], losses
    assert losses[1] - losses[0] < 0.9 * (losses[2] - losses[0]), losses
