"""Element codes against gfloat and ml_dtypes: every code, every rounding boundary."""

import ml_dtypes
import numpy as np
import pytest
import torch

from aqtx.formats import parse
from aqtx.formats.elements import code_to_value, round_value, value_to_code
from aqtx.formats.scales import decode_e8m0
from tests.formats.cases import DTYPES, INTS, MX, ORACLE, boundary_values, every_finite, oracle_round, oracle_values

ELEMENTS = {parse(name).element.name: parse(name).element for name in MX}
ML_DTYPES = {
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
}


def same_bits(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Equal including the sign of zero; any NaN equals any NaN."""
    return (left.view(torch.int32) == right.view(torch.int32)) | (left.isnan() & right.isnan())


def test_all_oracles_are_used() -> None:
    assert list(ELEMENTS) == list(ORACLE) == list(ML_DTYPES)


@pytest.mark.parametrize("name", ELEMENTS)
def test_every_code_decodes_as_the_oracles_say(name: str) -> None:
    codes = np.arange(2 ** ELEMENTS[name].bits, dtype=np.uint8)
    ours = code_to_value(torch.from_numpy(codes), ELEMENTS[name])
    assert same_bits(ours, torch.from_numpy(oracle_values(name)).float()).all()
    assert same_bits(ours, torch.from_numpy(codes.view(ML_DTYPES[name]).astype(np.float32))).all()


@pytest.mark.parametrize("name", ELEMENTS)
def test_every_finite_code_survives_a_round_trip(name: str) -> None:
    codes = torch.arange(2 ** ELEMENTS[name].bits)
    values = code_to_value(codes, ELEMENTS[name])
    finite = torch.isfinite(values)
    assert torch.equal(value_to_code(values[finite], ELEMENTS[name]), codes[finite].to(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ELEMENTS)
def test_rounding_at_every_boundary(name: str, dtype: torch.dtype) -> None:
    values = boundary_values(name, dtype)
    expected, codes = oracle_round(name, values)
    rounded = round_value(values, ELEMENTS[name])
    assert same_bits(rounded, expected).all(), values[~same_bits(rounded, expected)]
    assert torch.equal(value_to_code(rounded, ELEMENTS[name]), codes)


@pytest.mark.parametrize("name", ELEMENTS)
def test_rounding_of_every_bf16_value(name: str) -> None:
    values = every_finite(torch.bfloat16).float()
    expected, codes = oracle_round(name, values)
    rounded = round_value(values, ELEMENTS[name])
    assert same_bits(rounded, expected).all()
    assert torch.equal(value_to_code(rounded, ELEMENTS[name]), codes)


def test_published_ties_of_e2m1() -> None:
    values = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 5.1])
    assert round_value(values, ELEMENTS["e2m1"]).tolist() == [0, 1, 1, 2, 2, 4, 4, 6]


@pytest.mark.parametrize("name", INTS)
@pytest.mark.parametrize("zero", [None, 0, 1, "last"])
def test_integers_against_numpy(name: str, zero: int | str | None) -> None:
    element = parse(name).element
    last = 2**element.bits - 1
    offset = 2 ** (element.bits - 1) if zero is None else last if zero == "last" else zero
    zero_point = None if zero is None else torch.tensor(offset, dtype=torch.uint8)
    values = torch.arange(-2 * last, 2 * last + 1).repeat_interleave(3).float() / 2
    values[::3] += 1e-3
    values[1::3] -= 1e-3
    expected = np.clip(np.rint(values.numpy()), -offset, last - offset)
    rounded = round_value(values, element, zero_point)
    assert torch.equal(rounded, torch.from_numpy(expected))
    codes = value_to_code(rounded, element, zero_point)
    assert torch.equal(codes, torch.from_numpy(expected + offset).to(torch.uint8))
    assert torch.equal(code_to_value(codes, element, zero_point), rounded)


def test_e8m0_decodes_as_ml_dtypes_says() -> None:
    stored = np.arange(256, dtype=np.uint8)
    expected = stored.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    expected[0] = 2.0**-127  # a subnormal, which the cast keeps
    assert same_bits(decode_e8m0(torch.from_numpy(stored)), torch.from_numpy(expected)).all()
