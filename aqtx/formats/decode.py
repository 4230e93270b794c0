"""From the parts of a packed weight to its values: free functions, so that ops need no tensor subclass."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from aqtx.formats.elements import code_to_value
from aqtx.formats.packing import stored, unpack
from aqtx.formats.scales import Scales, decode_affine
from aqtx.formats.table import Format

SCALE_PARTS = ("scale", "zero_point", "per_tensor_scale", "super_scale")  # those of `Scales`, in its order
PARTS = ("qdata", *SCALE_PARTS)  # names of a packed weight's inner tensors, in memory and on disk


class Bucket(NamedTuple):
    """Experts of one format: the inner tensors [E_b, ...] by name; unpacked ones are all under `qdata`."""

    fmt: Format
    num_columns: int
    parts: Mapping[str, Tensor]

    @property
    def num_experts(self) -> int:
        """E_b."""
        return self.parts["qdata"].shape[0]

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """[E_b, N, K]."""
        return decode(self.parts, self.fmt, self.num_columns, dtype)

    def expert(self, index: int) -> "Bucket":
        """One of them, [1, N, K]."""
        return self._replace(parts={name: part[index : index + 1] for name, part in self.parts.items()})


def decode(parts: Mapping[str, Tensor], fmt: Format, num_columns: int, dtype: torch.dtype) -> Tensor:
    """Values [..., N, K] in `dtype` of packed codes and scales."""
    if not fmt.is_packed:
        return parts["qdata"].to(dtype)
    scales = Scales(*(parts.get(name) for name in SCALE_PARTS))  # type: ignore[arg-type]
    scale, zero_point, minimum = decode_affine(scales, fmt)
    codes = unpack(parts["qdata"], fmt.element.bits, num_columns)
    size = fmt.block_size(num_columns)
    missing = fmt.num_blocks(num_columns) * size - num_columns
    if missing:
        codes = pad(codes, (0, missing))
    zero = None if zero_point is None else zero_point.unsqueeze(-1)
    values = code_to_value(codes.unflatten(-1, (-1, size)), fmt.element, zero)
    values = values * scale.unsqueeze(-1)
    values = (values if minimum is None else values - minimum.unsqueeze(-1)).flatten(-2)
    return to_storage_dtype(stored(values)[..., :num_columns] if missing else values, dtype)


def to_storage_dtype(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Dequantized float32 values in `dtype`; finite codes stay finite, NaN stays NaN."""
    largest = min(torch.finfo(dtype).max, torch.finfo(values.dtype).max)
    return values.clamp(-largest, largest).to(dtype)
