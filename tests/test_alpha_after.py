"""Alpha after rounding: the same estimator on what the codes mean."""

import csv

import pytest
import torch

from aqtx.numerics import alpha_hill
from aqtx.passes.annotate_alpha import AnnotateAlpha
from aqtx.passes.quantize import Quantize
from aqtx.program.trace import trace
from aqtx.registry import Context
from aqtx.sensitivity.alpha_after import write_alpha_after
from tests.tiny import random_model


def test_it_is_the_alpha_of_the_dequantized_matrices_of_rounded_sites(tmp_path):
    program = trace(random_model(dtype=torch.float32))
    step = AnnotateAlpha(spectra="full", raw=False, sites=("*.experts.*",))
    step.run(program, Context(quiet=True))
    rounded = [site for site in program.sites() if site.expert == 0]
    for site in rounded:
        site.set("format", "int2")
    Quantize().run(program, Context(quiet=True))
    write_alpha_after(program, [step], tmp_path / "alpha_after.csv")
    rows = list(csv.DictReader((tmp_path / "alpha_after.csv").open()))
    assert [row["layer_name"] for row in rows] == [site.name for site in rounded]
    expected = alpha_hill(program.codes[rounded[0].name].dequantize(torch.float32))
    assert float(rows[0]["alpha_hill"]) == pytest.approx(expected, rel=1e-4)


def test_without_alphas_there_is_no_file(tmp_path):
    program = trace(random_model(dtype=torch.float32))
    write_alpha_after(program, [], tmp_path / "alpha_after.csv")
    write_alpha_after(program, [AnnotateAlpha()], tmp_path / "alpha_after.csv")
    assert not list(tmp_path.iterdir())
