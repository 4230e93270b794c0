"""K-quants against llama.cpp's own code and gguf's: every code decodes alike, and scales are chosen as well."""

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from aqtx.checkpoint.exports.gguf_types import encode as to_gguf
from aqtx.formats import QuantizedTensor, parse, quantize
from aqtx.formats.codec import choose_scales, encode
from aqtx.formats.packing import pack
from aqtx.formats.part_shapes import layout
from aqtx.numerics.gptq import gptq
from tests import llama_cpp
from tests.formats.cases import K_QUANTS, normal


def every_code(name: str) -> QuantizedTensor:
    """Random codes and scale codes, so that all of them occur, under half-precision scales down to the subnormal."""
    fmt, shape = parse(name), (64, 1024)
    generator = torch.Generator().manual_seed(0)
    wanted = layout(fmt, shape, on_disk=False)
    codes = torch.randint(0, 2**fmt.element.bits, shape, generator=generator).to(torch.uint8)
    scale = torch.randint(0, 2**fmt.scale.code_bits, wanted["scale"][0], generator=generator).to(torch.uint8)
    exponents = torch.randint(-24, 6, wanted["super_scale"][0], generator=generator)
    supers = (torch.rand(exponents.shape, generator=generator) + 1) * 2.0**exponents
    packed = pack(codes, fmt.element.bits)
    return QuantizedTensor(packed, name, 1024, torch.float32, scale, super_scale=supers.to(torch.float16))


@pytest.mark.parametrize("name", K_QUANTS)
def test_every_code_means_what_llama_cpp_and_gguf_say(name: str) -> None:
    made = every_code(name)
    rows, kind, _, rounded = to_gguf(made)
    size, num_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[name.upper()]]
    assert kind.name == name.upper() and rows.nbytes == made.numel() // size * num_bytes and rounded == 0
    assert made.format.num_bytes(made.shape) == rows.nbytes == sum(p.nbytes for p in made.to_disk().values())
    own = made.dequantize().numpy()
    assert np.array_equal(llama_cpp.decode(rows, name, made.numel()).reshape(own.shape), own)
    assert np.array_equal(dequantize(rows, kind), own)


def error(weight: Tensor, values: Tensor, importance: Tensor) -> float:
    return float(((values - weight).square() * importance).sum())


@pytest.mark.parametrize("name", K_QUANTS)
@pytest.mark.parametrize("weighted", [False, True])
def test_scales_are_chosen_as_well_as_by_llama_cpp(name: str, weighted: bool) -> None:
    """Its search has an error of its own: ours is at most 3 % above it, and below it in most cases."""
    weight = normal(64, 1024) * 0.02
    importance = normal(1024, seed=1).exp() if weighted else torch.ones(1024)
    fmt = parse(name)
    ours = encode(weight, fmt, choose_scales(weight, fmt, importance if weighted else None)).dequantize()
    theirs = llama_cpp.quantize(weight.numpy(), name, importance.numpy() if weighted else None)
    assert error(weight, ours, importance) < 1.03 * error(weight, torch.from_numpy(theirs), importance)


@pytest.mark.parametrize("name", K_QUANTS)
def test_gptq_is_better_than_llama_cpp_with_its_importance_matrix(name: str) -> None:
    """On the output error of correlated inputs; llama.cpp sees their squares, the diagonal, only."""
    weight = normal(32, 512) * 0.02
    mixed = normal(2048, 512, seed=1) @ (torch.eye(512) + 0.1 * normal(512, 512, seed=2))
    H = mixed.T @ mixed
    theirs = torch.from_numpy(llama_cpp.quantize(weight.numpy(), name, (H.diagonal() / 2048).numpy()))
    off = [weight - values for values in (gptq(weight, H, name).dequantize(), theirs)]
    ours, other = (float(torch.einsum("nk,kl,nl->", each, H, each)) for each in off)
    assert ours < 0.6 * other


@pytest.mark.parametrize("name", K_QUANTS)
def test_edges(name: str) -> None:
    """Zeros stay zeros; one large weight does not make the others of another super-block coarse; rows may be ragged."""
    assert not quantize(torch.zeros(2, 300), name).dequantize().any()
    weight = normal(1, 512)
    weight[0, 300] = 1000.0
    alone = quantize(weight[:, :256], name).dequantize()
    assert torch.equal(quantize(weight, name).dequantize()[:, :256], alone)
    # weights whose super-scale is the smallest of half precision are within one step of it
    tiny = quantize(weight[:, :256] * 1e-7, name).dequantize()
    assert tiny.isfinite().all() and (tiny - weight[:, :256] * 1e-7).abs().max() < 2.0**-20
