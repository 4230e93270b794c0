"""FP8 weights with real scales beside them: blocks of 128 x 128 (DeepSeek, Qwen), one a row, one a matrix.

A weight `KEY` of dtype E4M3 or E5M2 has its scales at `KEY_scale_inv` (they multiply, whatever the name says) or
`KEY_scale`; some publishers write `X.scale` or `X.qscale_weight` beside `X.weight`. A stack of experts has stacks of
scales. Scales of inputs, which a program that computes in FP8 reads, say nothing about the weights.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

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
from aqtx.program.names import Shape

_ELEMENTS = {"F8_E4M3": "e4m3", "F8_E5M2": "e5m2"}
_OF_INPUTS = ("activation_scale", "input_scale", "qscale_act", "k_scale", "v_scale")


def fp8_reader(
    files: CheckpointReader, section: Mapping[str, Any], config: Mapping[str, Any], dtype: torch.dtype | None
) -> PackedReader:
    """The folder with its FP8 weights decoded.

    Raises:
        InputError: a weight has no scales, scales that do not fit it, or is packed in another way.
    """
    blocks = _blocks(section, files)
    unread = [key for key in files.entries if key.endswith(_OF_INPUTS)]
    packed = {
        key: _packed(files, key, blocks)
        for key, entry in files.entries.items()
        if entry.dtype in _ELEMENTS and key not in unread
    }
    scales = {weight.parts["scale"] for weight in packed.values()}
    whole = [key for key, entry in files.entries.items() if entry.dtype in ("I8", "U8", "I32") and key not in scales]
    if whole:
        raise InputError(
            f"{files.folder}: {whole[0]} holds {files.entries[whole[0]].dtype} codes, and of FP8 checkpoints aqtx "
            "reads FP8 weights only; give the model that it was made from"
        )
    return PackedReader(files, packed, config, dtype=dtype, unread=unread)


def _blocks(section: Mapping[str, Any], files: CheckpointReader) -> tuple[int, int] | None:
    """`weight_block_size` of config.json."""
    told = section.get("weight_block_size")
    if told is None:
        return None
    if not (isinstance(told, list) and len(told) == 2 and all(type(size) is int and size > 0 for size in told)):
        where = f"{files.folder / 'config.json'}: quantization_config"
        raise InputError(f"{where}: weight_block_size must be two positive whole numbers, not {told!r:.80}")
    return told[0], told[1]


def _packed(files: CheckpointReader, key: str, blocks: tuple[int, int] | None) -> Packed:
    stem = key.removesuffix("weight")
    places = [f"{key}_scale_inv", f"{key}_scale"] + [f"{stem}scale", f"{stem}qscale_weight"] * key.endswith(".weight")
    place = next((place for place in places if place in files.entries), None)
    if place is None:
        raise InputError(f"{files.folder}: {key} is FP8, and no tensor holds its scales (such as {places[0]})")
    shape, scale = files.shape(key), files.shape(place)
    matrix = shape[-2:]
    grid = _grid(scale[1:] if len(shape) == 3 else scale)
    sizes = None if len(shape) not in (2, 3) or grid is None else block_sizes(grid, matrix, blocks)
    if grid is None or sizes is None or (len(shape) == 3 and scale[:1] != shape[:1]):
        raise InputError(f"{files.folder}: {place} of shape {list(scale)} does not fit {key} of {list(shape)}")
    kind = f"fp8 {_ELEMENTS[files.entries[key].dtype]}, {blocks_in_words(sizes, matrix)}"
    return Packed(shape, {"weight": key, "scale": place}, kind, partial(_decode, sizes=sizes, grid=grid))


def _grid(scale: Shape) -> Shape | None:
    """Scales of one matrix as [n, k]: none or one dimension is one scale, or one a row."""
    return {0: (1, 1), 1: (*scale, 1), 2: scale}.get(len(scale))


def _decode(parts: Parts, *, sizes: tuple[int, int], grid: Shape) -> Tensor:
    weight = parts["weight"].float()
    return weight.mul_(spread(real_scale(parts["scale"]).reshape(grid), tuple(weight.shape), sizes))
