"""Alpha after rounding: the same estimator on what the codes mean."""

import csv
import io

import pytest
import torch

from aqtx.checkpoint.open import trace
from aqtx.numerics import alpha_hill
from aqtx.passes.annotate_alpha import AnnotateAlpha
from aqtx.passes.quantize import Quantize
from aqtx.registry import Context
from tests.tiny import random_model


def test_it_is_the_alpha_of_the_dequantized_matrices_of_rounded_sites():
    program = trace(random_model(dtype=torch.float32))
    step = AnnotateAlpha(spectra="full", raw=False, sites=("*.experts.*",))
    step.run(program, Context(quiet=True))
    rounded = [site for site in program.sites() if site.expert == 0]
    for site in rounded:
        site.set("format", "int2")
    Quantize().run(program, Context(quiet=True))
    rows = list(csv.DictReader(io.StringIO(step.tables(program)["alpha_after.csv"])))
    assert [row["layer_name"] for row in rows] == [site.name for site in rounded]
    expected = alpha_hill(program.codes[rounded[0].name].dequantize(torch.float32))
    assert float(rows[0]["alpha_hill"]) == pytest.approx(expected, rel=1e-4)


def test_without_alphas_there_is_no_file():
    program = trace(random_model(dtype=torch.float32))
    assert AnnotateAlpha().tables(program) == {}
