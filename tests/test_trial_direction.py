"""The divergence of a trial is from the model's own predictions, not towards them."""

from pathlib import Path

import pytest
import torch

import aqtx
from aqtx.passes.annotate_trial import AnnotateTrial
from aqtx.registry import Context
from aqtx.sensitivity.rounded_model import RoundedModel
from tests.tiny import OLMOE, hub_tensors, random_model, write_checkpoint


def test_a_trial_weighs_by_the_predictions_before_rounding(tmp_path: Path) -> None:
    ids = torch.randint(0, 192, (4, 24), generator=torch.Generator().manual_seed(1))
    head = 8 * hub_tensors(random_model(OLMOE))["lm_head.weight"]  # sharp predictions
    program = aqtx.trace(write_checkpoint(tmp_path / "model", **{"lm_head.weight": head}), dtype=torch.float32)
    AnnotateTrial(formats=("int2",), measure="loss", sites=("lm_head",)).run(
        program, Context(quiet=True, load_calibration=lambda: ids)
    )
    model = RoundedModel(program)
    with torch.no_grad():
        p, q = (model.use(formats)(ids).double().log_softmax(-1) for formats in ({}, {"lm_head": "int2"}))
    forward, backward = (float((a.exp() * (a - b)).sum(-1).mean()) for a, b in ((p, q), (q, p)))
    assert abs(forward - backward) > 1e-2 * forward
    [site] = [site for site in program.sites() if site.name == "lm_head"]
    assert site.get("trial_loss")["int2"] == pytest.approx(forward, rel=1e-3)
