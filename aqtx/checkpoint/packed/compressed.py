"""compressed-tensors folders (llm-compressor, and what `aqtx export` writes) read as plain weights.

Decodes from the definition (a row is one little-endian bit string), by other steps than those that wrote it. A module
`X` stores `X.weight_packed` or `X.weight` with `X.weight_scale`, and where its scheme has them `weight_zero_point`,
`weight_global_scale` (divides), `weight_g_idx` (the group of each column) and `weight_shape`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aqtx.checkpoint.header import SIZES
from aqtx.checkpoint.packed.compressed_config import Scheme, Schemes
from aqtx.checkpoint.packed.reader import (
    Packed,
    PackedReader,
    Parts,
    block_sizes,
    blocks_in_words,
    real_scale,
    spread,
)
from aqtx.checkpoint.reader import CheckpointReader
from aqtx.errors import InputError
from aqtx.formats.elements import code_to_value
from aqtx.formats.table import Element, parse
from aqtx.machine.files import read_json
from aqtx.program.names import Shape

_ROLES = {
    "codes": "_packed",
    "scale": "_scale",
    "shape": "_shape",
    "zero": "_zero_point",
    "global": "_global_scale",
    "groups": "_g_idx",
}
_OF_INPUTS = (".input_scale", ".input_zero_point", ".input_global_scale", ".k_scale", ".v_scale", ".q_scale")
_ELEMENTS: dict[int, Element] = {4: parse("mxfp4").element, 6: parse("mxfp6_e2m3").element}


def packed_name(key: str) -> str:
    """Where the codes of a weight lie."""
    return f"{key}{_ROLES['codes']}"


def compressed_folder(folder: Path) -> PackedReader:
    """The reader of a folder by its own config.json, in the dtype that it declares."""
    config = read_json(folder / "config.json")
    return compressed_reader(CheckpointReader(folder), config["quantization_config"], config, None)


def compressed_reader(
    files: CheckpointReader, section: Mapping[str, Any], config: Mapping[str, Any], dtype: torch.dtype | None
) -> PackedReader:
    """The folder with its packed weights decoded.

    Raises:
        InputError: a weight has no scheme, or parts that are none of it.
    """
    schemes = Schemes.read(section, files.folder)
    keys = sorted({key.removesuffix(_ROLES["scale"]) for key in files.entries if key.endswith(".weight_scale")})
    packed = {key: _packed(files, key, schemes.of(key.removesuffix(".weight"))) for key in keys}
    unread = [key for key in files.entries if key.endswith(_OF_INPUTS)]
    return PackedReader(files, packed, config, dtype=dtype, unread=unread)


def _packed(files: CheckpointReader, key: str, scheme: Scheme) -> Packed:
    places = {"values": key} | {role: f"{key}{suffix}" for role, suffix in _ROLES.items()}
    parts = {role: place for role, place in places.items() if place in files.entries}
    if ("codes" in parts) == ("values" in parts):
        raise InputError(f"{files.folder}: one of {key} and {packed_name(key)} must be there, and only one")
    stored, scale = files.shape(parts.get("codes", key)), files.shape(parts["scale"])
    shape = _shape(files, parts, scheme, stored, scale)
    grid = scale if len(scale) == 2 else (*scale, *(1,) * (2 - len(scale)))
    grouped = "groups" in parts and len(grid) == 2  # columns of a group lie apart: the scales are spread by hand
    sizes = None if len(shape) != 2 or len(grid) != 2 else block_sizes(grid, shape, scheme.blocks(shape))
    if sizes is None:
        raise InputError(f"{files.folder}: {parts['scale']} of {list(scale)} does not fit {key} of {list(stored)}")
    decode = partial(_decode, scheme=scheme, how=_How(shape, grid, (sizes[0], 1) if grouped else sizes))
    return Packed(shape, parts, f"compressed-tensors {scheme.element}, {blocks_in_words(sizes, shape)}", decode)


def _shape(files: CheckpointReader, parts: Mapping[str, str], scheme: Scheme, stored: Shape, scale: Shape) -> Shape:
    """[N, K], as it is stored, or from the scales' groups, or from the bytes of codes that fill their rows."""
    if "codes" not in parts or len(stored) != 2:
        return stored
    if "shape" in parts:
        told = tuple(int(size) for size in files.get(parts["shape"]).tolist())
        if len(told) == 2 and told[0] == stored[0] and -(-told[1] * scheme.bits // 32) == stored[1]:
            return told
        raise InputError(f"{files.folder}: {parts['shape']} {list(told)} does not fit {list(stored)} words of codes")
    if scheme.group is not None and len(scale) == 2:
        return stored[0], scale[1] * scheme.group
    width = SIZES[files.entries[parts["codes"]].dtype]
    return stored[0], stored[1] * width * 8 // scheme.bits


@dataclass(frozen=True)
class _How:
    """The shape of a matrix and of its scales, and how far a scale reaches."""

    shape: Shape
    grid: Shape
    sizes: tuple[int, int]


def _decode(parts: Parts, *, scheme: Scheme, how: _How) -> Tensor:
    """float32 [N, K]."""
    scale = real_scale(parts["scale"]).reshape(how.grid)
    if "global" in parts:
        scale = scale * parts["global"].double().reciprocal().float()
    zero = _zero(parts, scheme, how)
    if "groups" in parts:
        group = parts["groups"].long()
        scale, zero = scale[:, group], zero if zero is None else zero[:, group]
    values = _values(parts, scheme, how)
    if zero is not None:
        values = values - spread(zero, how.shape, how.sizes)
    return values * spread(scale, how.shape, how.sizes)


def _values(parts: Parts, scheme: Scheme, how: _How) -> Tensor:
    """Values before scales; packed integers lose the middle of their range."""
    if "codes" not in parts:
        return parts["values"].float()
    codes = _codes(parts["codes"], scheme.bits, how.shape[1])
    return code_to_value(codes, _ELEMENTS[scheme.bits]) if scheme.is_float else codes.float() - scheme.middle


def _zero(parts: Parts, scheme: Scheme, how: _How) -> Tensor | None:
    """Zero points [n, k] as signed numbers: packed along the rows, or as they are."""
    if "zero" not in parts or scheme.is_float:
        return None
    stored = parts["zero"]
    if stored.dtype != torch.int32:
        return stored.float().reshape(how.grid)
    return _codes(stored.t().contiguous(), scheme.bits, how.grid[0]).t().float() - scheme.middle


def _codes(packed: Tensor, bits: int, count: int) -> Tensor:
    """Codes [N, count] of rows that are little-endian bit strings, in bytes or int32 words."""
    data = torch.nn.functional.pad(packed.contiguous().view(torch.uint8), (0, 1)).int()
    at = torch.arange(count) * bits
    pair = data[:, at // 8] | (data[:, at // 8 + 1] << 8)
    return (pair >> (at % 8)) & (2**bits - 1)
