"""Distillation of what stays unquantized: the parts are found by their place in the graph, and nothing else moves."""

from pathlib import Path

import pytest
import torch

from aqtx.checkpoint.open import trace
from aqtx.errors import InputError
from aqtx.finetune.losses import divergence
from aqtx.finetune.parts import Part, vectors_of_parts
from aqtx.finetune.routed import routed
from aqtx.formats import quantize
from aqtx.passes.distill import Distill
from aqtx.passes.unfreeze import Unfreeze
from aqtx.program.program import Program
from aqtx.registry import Changes, Context
from aqtx.runs.resume_points import restore_state, save_state
from tests.marks import slow
from tests.tiny import OLMOE, random_model

LLAMA = OLMOE | {"model_type": "llama", "attention_bias": True, "tie_word_embeddings": True}
GEMMA = OLMOE | {"model_type": "gemma3_text", "head_dim": 32, "num_hidden_layers": 1}
SHRUNK = 0.5  # a systematic fault, so that a few steps of training generalise


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(0, 12, (40, 24), generator=torch.Generator().manual_seed(0))


def rounded(config: dict[str, object], roles: tuple[str, ...]) -> Program:
    """A program with the matrices of some roles rounded, the first layer's last product shrunk."""
    program = trace(random_model(config, dtype=torch.float32))
    for site in program.sites():
        if site.category in roles:
            site.set("format", "int4")
            shrunk = SHRUNK if site.layer == 0 and site.category == "mlp_down" else 1.0
            program.codes[site.name] = quantize(program.read(site) * shrunk, "int4")
    return program


def distilled(program: Program, ids: torch.Tensor, *what: Part, **fields: float) -> Changes:
    Unfreeze(what=what).run(program, Context(quiet=True))
    context = Context(quiet=True, load_calibration=lambda: ids)
    return Distill(**{"epochs": 6.0, "batch_size": 2, "checks": 6, **fields}).run(program, context)


MLP = ("mlp_gate", "mlp_up", "mlp_down")


@pytest.mark.parametrize(
    ("config", "what"),
    [(OLMOE, ("router", "norm", "attention")), *slow((LLAMA, ("norm", "bias")))],
    ids=["olmoe", "llama"],
)
def test_predictions_come_nearer_and_only_the_parts_move(config: dict, what: tuple[Part, ...], ids: torch.Tensor):
    program, untouched = rounded(config, MLP), rounded(config, MLP)
    changes = distilled(program, ids, *what)
    names = program.weights.names()
    moved = {name for name in names if not torch.equal(program.weights.get(name), untouched.weights.get(name))}
    assert moved and moved == set(program.trainable)
    assert set(changes.changed) == {name.removesuffix(".weight") for name in moved}
    assert all(torch.equal(program.codes[name].qdata, untouched.codes[name].qdata) for name in untouched.codes)
    measuring = ids[-4:]
    with torch.no_grad():
        expected = routed(untouched, rounded=False)(measuring)[0]
        before, after = (divergence(expected, p.module()(measuring)).mean() for p in (untouched, program))
    assert after < 0.9 * before
    told = changes.details["held_out_divergence"]
    assert told["before"] == pytest.approx(float(before), rel=1e-3)
    assert told["after"] == pytest.approx(float(after), rel=1e-3)
    assert told["change"]["high"] < 0


def test_parts_are_found_by_what_they_do():
    llama, gemma = (trace(random_model(config, dtype=torch.float32)) for config in (LLAMA, GEMMA))
    biases = vectors_of_parts(llama, ["bias"])
    assert biases[0] == "model.layers.0.self_attn.q_proj.bias" and len(biases) == 2 * 4
    assert len(vectors_of_parts(llama, ["norm"])) == 2 * 2 + 1
    gains = vectors_of_parts(gemma, ["norm"])  # 1 + w: four around attention and mlp, q, k, and the last
    assert len(gains) == 4 + 2 + 1 and all("norm" in name for name in gains)


def test_what_is_quantized_missing_or_empty_is_told(ids: torch.Tensor):
    program = rounded(OLMOE, (*MLP, "attn_q"))
    changes = Unfreeze(what=("attention",)).run(program, Context(quiet=True))
    assert {refusal.site.rsplit(".", 1)[1] for refusal in changes.refused} == {"q_proj"}
    assert not any("q_proj" in name for name in program.trainable)
    assert Unfreeze(what=()).validate() == ["what names no part to train: router, norm, attention or bias"]
    assert Unfreeze(what=("bias",)).misfits(program) == ["what: this model has no bias to train"]
    with pytest.raises(InputError, match="nothing is unfrozen"):
        Distill().run(rounded(OLMOE, MLP), Context(quiet=True, load_calibration=lambda: ids))


def test_what_is_unfrozen_survives_a_resume(tmp_path: Path):
    program = rounded(OLMOE, ())
    Unfreeze(what=("norm",)).run(program, Context(quiet=True))
    save_state(program, [], tmp_path)
    fresh = rounded(OLMOE, ())
    restore_state(fresh, tmp_path)
    assert fresh.trainable == program.trainable and len(fresh.trainable) == 2 * 4 + 1
