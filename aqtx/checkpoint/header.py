"""The header of a safetensors file, read by itself: keys, dtypes, shapes and places are known before any tensor is.

The format is described at https://github.com/huggingface/safetensors ("Format"): eight bytes of header length, a JSON
object, then the tensors without gaps.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aqtx.errors import InputError

# Bytes of an element, by the format's name of its dtype.
SIZES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
_LARGEST_HEADER = 100_000_000  # as the library has it


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies, and what it is, as the file's header says."""

    file: Path
    dtype: str  # safetensors' name: BF16, F32, U8, ...
    shape: tuple[int, ...]


def read_header(file: Path) -> dict[str, Entry]:
    """Keys, dtypes and shapes of a safetensors file, whose length must be what its header says.

    Raises:
        InputError: the file is cut short or no such file, an entry is malformed, tensors overlap or leave gaps.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > size - 8:
            raise InputError(f"{file} is truncated or no safetensors file")
        if length > _LARGEST_HEADER:
            raise InputError(f"{file}: its header has {length:,} bytes, more than {_LARGEST_HEADER:,}")
        header = _parse(stream.read(length), file)
    header.pop("__metadata__", None)
    ends = [(_offsets(file, key, entry), key) for key, entry in header.items()]
    at = 0
    for (start, end), key in sorted(ends):
        if start != at:
            raise InputError(f"{file}: tensor {key!r:.80} begins at byte {start}, the one before it ends at {at}")
        at = end
    if size != 8 + length + at:
        raise InputError(f"{file} is truncated: its header asks for {8 + length + at} bytes, the file has {size}")
    return {key: Entry(file, entry["dtype"], tuple(entry["shape"])) for key, entry in header.items()}


def _parse(text: bytes, file: Path) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key stands in it twice")
        return found

    try:
        header = json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        words = "its header is not JSON" if not str(error).startswith("a key") else str(error)
        raise InputError(f"{file} is no safetensors file: {words}") from None
    if not isinstance(header, dict):
        raise InputError(f"{file} is no safetensors file: its header is no JSON object")
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InputError(f"{file} is no safetensors file: __metadata__ must map text to text")
    return header


def _offsets(file: Path, key: str, entry: Any) -> tuple[int, int]:
    """First and last byte of a tensor, when its entry makes sense."""
    keys = {"dtype", "shape", "data_offsets"}
    if not isinstance(entry, dict) or entry.keys() != keys:
        raise InputError(f"{file}: tensor {key!r:.80} must be described by dtype, shape and data_offsets")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in SIZES:
        raise InputError(f"{file}: tensor {key!r:.80} has the unknown dtype {entry['dtype']!r:.80}")
    if not _whole(shape):
        raise InputError(f"{file}: the shape of tensor {key!r:.80} must be a list of whole numbers, not {shape!r:.80}")
    if not _whole(offsets) or len(offsets) != 2:
        raise InputError(f"{file}: data_offsets of tensor {key!r:.80} must be two whole numbers, not {offsets!r:.80}")
    wanted = SIZES[entry["dtype"]] * math.prod(shape)
    if offsets[1] - offsets[0] != wanted:
        raise InputError(
            f"{file}: tensor {key!r:.80} of shape {shape!r:.80} takes {wanted} bytes, "
            f"its data_offsets {offsets!r:.80} give it {offsets[1] - offsets[0]}"
        )
    return offsets[0], offsets[1]


def _whole(numbers: Any) -> bool:
    """Whether these are sizes: whole numbers from 0 to what 64 bits hold."""
    return isinstance(numbers, list) and all(
        isinstance(number, int) and not isinstance(number, bool) and 0 <= number < 2**63 for number in numbers
    )
