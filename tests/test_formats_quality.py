"""Signal to noise on known distributions, idempotence, and bytes: what a format's name promises."""

import math

import numpy as np
import pytest
import torch

from aqtx.errors import InputError
from aqtx.formats import QuantizedTensor, fake_quantize, parse, quantize
from tests.formats.cases import DTYPES, EVERY, K_QUANTS, decibels, normal

NUM_SAMPLES = 1 << 20  # the figures are of 4M samples; the slow test takes them all
GAUSSIAN = {
    "mxfp4": 18.78, "mxfp4@even": 19.02, "mxfp4@rceil": 18.75, "mxfp4@search": 19.05,
    "mxfp6_e2m3": 30.94, "mxfp6_e2m3@even": 30.99, "mxfp6_e2m3@rceil": 30.96, "mxfp6_e2m3@search": 30.99,
    "mxfp6_e3m2": 25.36, "mxfp6_e3m2@even": 25.54, "mxfp6_e3m2@rceil": 25.54, "mxfp6_e3m2@search": 25.54,
    "mxfp8_e4m3": 30.65, "mxfp8_e4m3@even": 31.17, "mxfp8_e4m3@rceil": 31.52, "mxfp8_e4m3@search": 31.52,
    "mxfp8_e5m2": 25.36, "mxfp8_e5m2@even": 25.54, "mxfp8_e5m2@rceil": 25.54, "mxfp8_e5m2@search": 25.54,
    "nvfp4": 20.44, "fp4_g32": 19.91, "fp4": 19.26,
    "int2_g32@amax": 3.64, "int2@amax": 2.31, "int2_asym@amax": 5.97,
    "int3_g32@amax": 12.90, "int3@amax": 11.25, "int3_asym@amax": 13.33,
    "int4_g32@amax": 20.26, "int4@amax": 18.62, "int4_asym@amax": 19.95, "int6_g32": 33.19, "int6": 31.54,
    "int6_asym": 32.42, "int8_g32": 45.44, "int8": 43.79, "int8_asym": 44.56,
}  # fmt: skip
LAPLACE = {
    "mxfp4": 17.94, "mxfp4@rceil": 17.58, "mxfp6_e2m3": 30.29, "mxfp6_e2m3@rceil": 30.24, "mxfp6_e3m2": 25.21,
    "mxfp6_e3m2@rceil": 25.56, "mxfp8_e4m3": 30.00, "mxfp8_e4m3@rceil": 31.54, "mxfp8_e5m2": 25.21,
    "mxfp8_e5m2@rceil": 25.56, "nvfp4": 20.66,
}  # fmt: skip
STUDENT = {
    "mxfp4": 17.63, "mxfp4@rceil": 17.11, "mxfp6_e2m3": 29.99, "mxfp6_e2m3@rceil": 29.91, "mxfp6_e3m2": 25.17,
    "mxfp6_e3m2@rceil": 25.54, "mxfp8_e4m3": 29.87, "mxfp8_e4m3@rceil": 31.52, "mxfp8_e5m2": 25.17,
    "mxfp8_e5m2@rceil": 25.55, "nvfp4": 20.73,
}  # fmt: skip
# The tolerances of the published figures. Student's t has an infinite fourth moment.
# INT scales are bf16 here and fp32 there: 2^-9 of relative error at most in a scale, below the tolerance.
CASES = [
    *(("gaussian", name, value, 0.05) for name, value in GAUSSIAN.items()),
    *(("laplace", name, value, 0.05) for name, value in LAPLACE.items()),
    *(("t4", name, value, 0.15) for name, value in STUDENT.items()),
]
DRAW = {
    "gaussian": lambda rng, n: rng.standard_normal(n),
    "laplace": lambda rng, n: rng.laplace(size=n),
    "t4": lambda rng, n: rng.standard_t(4, size=n),
}


@pytest.fixture(scope="module")
def samples() -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(0)
    drawn = {kind: draw(rng, NUM_SAMPLES) for kind, draw in DRAW.items()}
    return {kind: torch.from_numpy(values).float().view(-1, 2048) for kind, values in drawn.items()}


@pytest.mark.parametrize(("kind", "name", "expected", "tolerance"), CASES)
def test_signal_to_noise(
    samples: dict[str, torch.Tensor], kind: str, name: str, expected: float, tolerance: float
) -> None:
    weight = samples[kind]
    if name == "int8_g32":  # with fp32 scales the largest of 32 weights has no error, with bf16 scales it has
        tolerance += 10 * math.log10(32 / 31)
    if kind == "t4":  # a quarter as many samples as the figure has: twice its sampling error at most
        tolerance *= 1.5
    assert decibels(weight, fake_quantize(weight, name)) == pytest.approx(expected, abs=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name", "expected", "tolerance"), CASES)
def test_signal_to_noise_of_four_million(kind: str, name: str, expected: float, tolerance: float) -> None:
    if name == "int8_g32":
        tolerance += 10 * math.log10(32 / 31)
    weight = torch.from_numpy(DRAW[kind](np.random.default_rng(1), 4 * 2**20)).float().view(-1, 2048)
    assert decibels(weight, fake_quantize(weight, name)) == pytest.approx(expected, abs=tolerance)


def test_search_rescues_two_bits(samples: dict[str, torch.Tensor]) -> None:
    weight = samples["gaussian"][:128]
    assert decibels(weight, fake_quantize(weight, "int2")) > 8.3 - 0.05
    assert decibels(weight, fake_quantize(weight, "int3")) > 13.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", EVERY)
def test_quantizing_again_changes_nothing(name: str, dtype: torch.dtype) -> None:
    once = quantize(normal(3, 32, 320, dtype=dtype), name).dequantize()
    assert torch.equal(quantize(once, name).dequantize(), once)


@pytest.mark.parametrize("name", [*EVERY, *K_QUANTS])
def test_fake_quantize_is_quantize_and_dequantize(name: str) -> None:
    for shape in ((8, 256), (2, 3, 100), (2, 1, 1)):
        weight = normal(*shape, dtype=torch.bfloat16)
        made = quantize(weight, name)
        assert made.shape == weight.shape
        assert made.dtype == weight.dtype
        assert torch.equal(fake_quantize(weight, name), made.dequantize())


@pytest.mark.parametrize("name", [*EVERY, *K_QUANTS])
def test_a_stack_is_its_experts(name: str) -> None:
    weight = normal(3, 16, 192) * torch.tensor([1.0, 30.0, 0.1]).view(3, 1, 1)
    stack = quantize(weight, name)
    for expert in range(3):
        assert torch.equal(quantize(weight[expert], name).dequantize(), stack[expert].dequantize())


@pytest.mark.parametrize("name", EVERY)
def test_bytes_are_bits_times_weights(name: str) -> None:
    made = quantize(normal(2, 16, 256), name)
    assert made.num_bytes == parse(name).num_bytes(made.shape) == parse(name).bits(made.shape) * made.numel() / 8
    on_disk = sum(part.numel() * part.element_size() for part in made.to_disk().values())
    assert on_disk == made.num_bytes


@pytest.mark.parametrize("name", [*EVERY, *K_QUANTS])
@pytest.mark.parametrize("num_columns", [1, 7, 33, 100, 130, 576])
def test_the_disk_layout_is_lossless_and_exactly_as_long(name: str, num_columns: int) -> None:
    made = quantize(normal(3, num_columns), name)
    parts = made.to_disk()
    assert sum(part.numel() * part.element_size() for part in parts.values()) == parse(name).num_bytes(made.shape)
    back = QuantizedTensor.from_disk(parts, name, tuple(made.shape), made.dtype)
    assert torch.equal(back.qdata, made.qdata)
    assert torch.equal(back.dequantize(), made.dequantize())


@pytest.mark.parametrize(("name", "codes", "expected"), [
    ("mxfp4", [1, 2, 3, 4], [0x21, 0x43]),
    ("int6", [1, 2, 3, 4], [0b10_000001, 0b0011_0000, 0b000100_00]),
    ("int5", [1, 2, 3, 4, 5, 6, 7, 31], [0b010_00001, 0b0_00011_00, 0b0101_0010, 0b11_00110_0, 0b11111_001]),
    ("int3", [1, 2, 3, 4, 5, 6, 7, 0], [0b11_010_001, 0b0_101_100_0, 0b000_111_11]),
    ("int2", [1, 2, 3, 0], [0b00_11_10_01]),
    ("int8", [1, 255], [1, 255]),
])  # fmt: skip
def test_bit_positions_on_disk(name: str, codes: list[int], expected: list[int]) -> None:
    from aqtx.formats.packing import from_disk_order, to_disk_order

    bits = parse(name).element.bits
    packed = to_disk_order(torch.tensor(codes, dtype=torch.uint8), bits)
    assert packed.tolist() == expected
    assert from_disk_order(packed, bits, len(codes)).tolist() == codes


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_bit_positions_in_memory(bits: int) -> None:
    from aqtx.formats.packing import PLANES, pack, unpack

    codes = torch.randint(0, 2**bits, (128,), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert torch.equal(unpack(packed, bits, 128), codes)
    start = shift = 0
    for width in PLANES[bits]:
        for index, code in enumerate(codes.tolist()):
            slab, within = divmod(index, 16 * 8 // width)
            byte = packed[start + 16 * slab + within % 16].item()
            assert (byte >> (width * (within // 16))) & (2**width - 1) == (code >> shift) & (2**width - 1)
        start, shift = start + 16 * width, shift + width


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["mxfp4", "int4_asym", "nvfp4", "bf16"])
def test_a_weight_that_is_not_finite_is_an_error(name: str, value: float) -> None:
    weight = normal(2, 3, 64)
    weight[1, 2, 5] = value
    with pytest.raises(InputError, match=r"index \[1, 2, 5\]"):
        quantize(weight, name)


def test_what_is_not_a_weight_is_refused() -> None:
    with pytest.raises(InputError, match="float weight"):
        quantize(torch.zeros(4, 4, dtype=torch.int32), "int4")
    with pytest.raises(InputError, match="float weight"):
        quantize(torch.zeros(4), "int4")
