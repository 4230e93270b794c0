"""The Python interface that is promised by name, called as a stranger would: lists, parameters, zero tokens, NaN."""

import math

import numpy as np
import pytest
import torch

import aqtx
from aqtx.errors import InputError

W = torch.randn(8, 96, generator=torch.Generator().manual_seed(0))
H = torch.eye(96)
COST, SIZE = [[3, 2, 1], [6, 3, 1]], [[1, 2, 3], [1, 2, 3]]


def test_every_promised_name_is_there():
    assert {"trace", "alpha", "run", "apply", "save", "load"} <= set(aqtx.__all__)
    assert {"alpha_hill", "allocate", "gptq", "hadamard"} <= set(aqtx.numerics.__all__)
    assert torch.allclose(aqtx.numerics.hadamard(aqtx.numerics.hadamard(W)), W, atol=1e-6)
    assert aqtx.formats.quantize(W, "mxfp4@even", scale_rule="floor").format_name == "mxfp4"


def test_parameters_are_taken_as_they_are():
    large = torch.nn.Parameter(torch.randn(300, 300))
    assert aqtx.numerics.alpha_hill(large) == aqtx.numerics.alpha_hill(large.detach())
    weight = torch.nn.Parameter(W)
    found = aqtx.numerics.gptq(weight, H, "int4").dequantize()
    assert torch.equal(found, aqtx.numerics.gptq(W, H, "int4").dequantize())
    nearest = aqtx.formats.quantize(weight, "int4").dequantize()
    assert (found - W).norm() <= (nearest - W).norm()  # H is the identity: the error of the weights themselves


@pytest.mark.parametrize("table", [list, np.array, torch.tensor], ids=["lists", "array", "tensor"])
def test_allocate_takes_any_table_of_numbers(table):
    found = aqtx.numerics.allocate(table(COST), table(SIZE), 4)
    assert (found.choice.tolist(), found.cost, found.bound, found.gap) == ([0, 2], 4.0, 4.0, 0.0)


def test_a_budget_without_end_has_a_bound():
    found = aqtx.numerics.allocate(COST, SIZE, math.inf)
    assert (found.choice.tolist(), found.bound) == ([2, 2], 2.0)


def test_a_prior_of_another_dtype_is_taken():
    found = [
        aqtx.numerics.gptq(W, H, "int4", num_tokens=9, prior=H.to(dtype)).qdata for dtype in (H.dtype, torch.double)
    ]
    assert torch.equal(*found)


def test_one_token_count_serves_a_batch():
    stack, moments = torch.stack([W, W]), torch.stack([H, H])
    each = aqtx.numerics.gptq(stack, moments, "mxfp4", num_tokens=[7, 7])
    assert torch.equal(each.qdata, aqtx.numerics.gptq(stack, moments, "mxfp4", num_tokens=7).qdata)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: aqtx.numerics.alpha_hill(W[0]), "a matrix"),
        (lambda: aqtx.numerics.allocate(COST, SIZE[:1], 4), "size \\(1, 3\\)"),
        (lambda: aqtx.numerics.allocate(COST[0], SIZE[0], 4), "cost must be"),
        (lambda: aqtx.numerics.allocate(COST, SIZE, math.nan), "budget is not a number"),
        (lambda: aqtx.numerics.allocate(COST, SIZE, 4, groups=[0]), "each of 2 sites"),
        (lambda: aqtx.numerics.gptq(W * math.nan, H, "int4"), "W has nan at index"),
        (lambda: aqtx.numerics.gptq(W.int(), H, "int4"), "W must be floats"),
        (lambda: aqtx.numerics.gptq(W, H, "int4", damp_fraction=math.nan), "damp_fraction"),
        (lambda: aqtx.numerics.gptq(W, H, "int4", num_tokens=-1), "num_tokens must be counts"),
        (lambda: aqtx.numerics.gptq(W, H, "int4", num_tokens=3, prior=H * math.nan), "prior holds NaN"),
        (lambda: aqtx.numerics.gptq(W, H, "int4", num_tokens=3, prior=-H), "prior is not positive semi-definite"),
        (lambda: aqtx.numerics.gptq(W, H, "int4", num_tokens=3, prior=H[0]), "prior must be"),
        (lambda: aqtx.numerics.gptq(W, -H, "int4"), "H is not positive semi-definite"),
        (lambda: aqtx.numerics.gptq(W[:0], H, "int4"), "holds no weights"),
        (lambda: aqtx.numerics.hadamard(W, 0), "order 0"),
        (lambda: aqtx.numerics.hadamard(W.int()), "it takes floats"),
        (lambda: aqtx.formats.quantize(W, None), "named by text"),
        (lambda: aqtx.formats.quantize(W[:, :0], "int4"), "cannot quantize"),
    ],
)
def test_what_cannot_be_meant_is_told_in_a_sentence(call, words):
    with pytest.raises(InputError, match=words):
        call()


def test_a_quantized_folder_is_analysed_and_not_quantized_again(tmp_path):
    recipe = {
        "version": 1,
        "model": {"source": "tinymoe"},
        "passes": [{"assign_plan": {"method": "uniform", "candidates": ["mxfp8"]}}, "quantize", "emit"],
        "report": False,
    }
    folder = aqtx.apply(recipe, output=tmp_path / "run").directory  # a Path is as good as text
    assert aqtx.apply(recipe, output=folder, resume=True).directory == folder
    with pytest.raises(InputError, match="finished run of another recipe: seed was 0 and is now 1"):
        aqtx.apply(recipe, output=folder, resume=True, seed=1)
    program = aqtx.load(folder)
    assert len(repr(program)) < 200
    site = next(site for site in program.sites() if site.expert is not None)
    assert program.read(site).dtype is torch.float32
    assert math.isfinite(aqtx.alpha(folder)[site.name])
    with pytest.raises(InputError, match="192 sites are quantized already"):
        aqtx.apply(recipe, output=tmp_path / "again", model__source=folder)


def test_a_file_is_no_folder_to_save_in(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="is a file"):
        aqtx.save(aqtx.trace("tinymoe"), tmp_path / "file")


@pytest.mark.parametrize("ids", [torch.zeros(4, dtype=torch.long), torch.rand(2, 8), torch.full((2, 8), 10**6)])
def test_calibration_must_be_token_ids(ids):
    with pytest.raises(InputError, match="calibration"):
        aqtx.run(aqtx.trace("tinymoe"), [], calibration=ids)
