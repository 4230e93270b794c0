"""Exports that torchao's own helpers load, by value."""

from pathlib import Path

import pytest

from aqtx.checkpoint.exports.run import export
from aqtx.checkpoint.exports.torchao import load
from aqtx.errors import InputError
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
}


def test_each_class_loads_with_our_values(tmp_path: Path) -> None:
    folder = quantized(write_checkpoint(tmp_path / "source"), tmp_path / "q", FORMATS)
    made = export(folder, "torchao", tmp_path / "out")
    assert made.checked is not None and made.checked.allowed == 0 and made.checked.values > 200_000
    kinds = {type(value).__name__ for value in load(tmp_path / "out").values()}
    assert kinds == {"Tensor", "IntxUnpackedToInt8Tensor", "MXTensor", "NVFP4Tensor"}


def test_what_torchao_has_no_class_for_is_refused(tmp_path: Path) -> None:
    folder = quantized(write_checkpoint(tmp_path / "source"), tmp_path / "q", {"*.q_proj": "fp6"})
    with pytest.raises(InputError, match=r"torchao has no form for fp6_e2m3 .* is int6"):
        export(folder, "torchao", tmp_path / "out")
