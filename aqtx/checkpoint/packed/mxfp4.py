"""MXFP4 as gpt-oss publishes it: `KEY_blocks` [E, N, K / 32, 16] and `KEY_scales` [E, N, K / 32], both bytes.

A byte holds two E2M1 codes, the first value in its low half; a scale is E8M0, 2^(byte - 127) (OCP Microscaling Formats
v1.0, sections 5.3 and 5.4). transformers' parameter KEY is [E, K, N], the other way round.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from aqtx.checkpoint.packed.reader import Packed, PackedReader, Parts
from aqtx.checkpoint.reader import CheckpointReader
from aqtx.errors import InputError
from aqtx.formats.elements import code_to_value
from aqtx.formats.scales import decode_e8m0
from aqtx.formats.table import parse

_ELEMENT = parse("mxfp4").element
_BLOCK_BYTES = 16
_CODES, _SCALES = "_blocks", "_scales"


def mxfp4_reader(files: CheckpointReader, config: Mapping[str, Any], dtype: torch.dtype | None) -> PackedReader:
    """The folder with its MXFP4 experts decoded.

    Raises:
        InputError: codes lack their scales, or the two do not fit.
    """
    coded = [key.removesuffix(_CODES) for key, entry in files.entries.items() if _is_codes(key, entry.dtype)]
    return PackedReader(files, {key: _packed(files, key) for key in coded}, config, dtype=dtype)


def _is_codes(key: str, dtype: str) -> bool:
    return key.endswith(_CODES) and dtype == "U8"


def _packed(files: CheckpointReader, key: str) -> Packed:
    codes, scales = f"{key}{_CODES}", f"{key}{_SCALES}"
    if scales not in files.entries:
        raise InputError(f"{files.folder}: tensor {scales} is missing")
    shape, scale = files.shape(codes), files.entries[scales]
    if len(shape) != 4 or shape[3] != _BLOCK_BYTES or scale.shape != shape[:3] or scale.dtype != "U8":
        raise InputError(
            f"{files.folder}: {codes} of {list(shape)} and {scales} of {list(scale.shape)} ({scale.dtype}) are not "
            "[E, N, G, 16] and [E, N, G], both bytes"
        )
    logical = (shape[0], shape[2] * _BLOCK_BYTES * 2, shape[1])
    return Packed(logical, {"codes": codes, "scale": scales}, "mxfp4, blocks of 32", _decode)


def _decode(parts: Parts) -> Tensor:
    """codes [N, G, 16], scale [N, G] -> [K, N], a view of [N, K]."""
    codes, byte = parts["codes"], torch.arange(256)
    pairs = code_to_value(torch.stack((byte & 15, byte >> 4), -1), _ELEMENT)  # [256, 2]: what each byte means
    values = pairs.index_select(0, codes.flatten().int()).view(*codes.shape[:2], -1)  # [N, G, 32]
    return values.mul_(decode_e8m0(parts["scale"]).unsqueeze(-1)).flatten(-2).t()
