"""Exports that torchao's own helpers load, by value."""

from pathlib import Path

import pytest
import torch

import aqtx
from aqtx.checkpoint.exports.run import export
from aqtx.checkpoint.exports.torchao import load
from aqtx.errors import InputError
from aqtx.formats.activation import quantize_tokens
from tests.formats.cases import normal
from tests.quantized_folders import quantized
from tests.tiny import write_checkpoint

FORMATS = {
    "*.q_proj": "int4_g32",
    "*.k_proj": "int3_asym",
    "*.v_proj": "int8_row",
    "*.o_proj": "mxfp8",
    "*.gate_proj": "mxfp4",
    "*.up_proj": "mxfp6",
    "*.down_proj": "nvfp4",
    "lm_head": "int4_row_asym",
}


def test_each_class_loads_with_our_values(tmp_path: Path) -> None:
    folder = quantized(write_checkpoint(tmp_path / "source"), tmp_path / "q", FORMATS)
    made = export(folder, "torchao", tmp_path / "out")
    assert made.checked is not None and made.checked.allowed == 0 and made.checked.values > 200_000
    kinds = {type(value).__name__ for value in load(tmp_path / "out").values()}
    assert kinds == {"Tensor", "Int4Tensor", "IntxUnpackedToInt8Tensor", "MXTensor", "NVFP4Tensor"}


def test_int4_lies_as_its_gpu_kernel_reads_it(tmp_path: Path) -> None:
    """`mslk`'s `bf16i4bf16_rowwise`: codes in two's complement, even ones in the low half; scales and offsets [G, N].

    torchao has nothing that decodes an `Int4Tensor` on a CPU, so bytes are held against those that `mslk` describes.
    """
    folder = quantized(write_checkpoint(tmp_path / "source"), tmp_path / "q", {"*.q_proj": "int4_g32"})
    made = export(folder, "torchao", tmp_path / "out")
    assert any("2 matrices are torchao's Int4Tensor" in note for note in made.notes)
    theirs = load(tmp_path / "out")
    sites = [site for site in aqtx.load(folder).sites() if site.name.endswith("q_proj")]
    program = aqtx.load(folder)
    for site in sites:
        found, own = theirs[f"{site.name}.weight"], program.stored(site)
        steps = own.codes().to(torch.int8) - 8  # -8 to 7
        assert torch.equal(found.qdata, ((steps[:, 1::2] << 4) | (steps[:, ::2] & 15)).view(torch.uint8))
        assert torch.equal(found.scale, own.scale.t()) and not found.zero_point.any()
        assert found.shape == own.shape and found.block_size == [1, 32] and found.dtype == torch.bfloat16
        part = found[8:24]  # torchao's own slice goes through all parts
        assert torch.equal(part.qdata, found.qdata[8:24]) and torch.equal(part.scale, own.scale.t()[:, 8:24])
    assert len(sites) == 2


def test_mx_weights_round_their_inputs_as_here(tmp_path: Path) -> None:
    """torchao multiplies an `MXTensor` with rounded inputs only; on a CPU it emulates that."""
    folder = quantized(write_checkpoint(tmp_path / "source"), tmp_path / "q", {"*_proj": "mxfp4"}, aq="mxfp8")
    assert export(folder, "torchao", tmp_path / "out").notes == []
    x = normal(5, 128, dtype=torch.bfloat16)
    weight = load(tmp_path / "out")["model.layers.0.self_attn.q_proj.weight"]
    expected = quantize_tokens(x, "mxfp8").float() @ weight.dequantize().float().t()
    torch.testing.assert_close(torch.nn.functional.linear(x, weight), expected.bfloat16())


def test_what_torchao_has_no_class_for_is_refused(tmp_path: Path) -> None:
    folder = quantized(write_checkpoint(tmp_path / "source"), tmp_path / "q", {"*.q_proj": "fp6"})
    with pytest.raises(InputError, match=r"torchao has no form for fp6_e2m3 .* is int6"):
        export(folder, "torchao", tmp_path / "out")
