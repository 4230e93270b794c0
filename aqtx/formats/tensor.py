"""`QuantizedTensor`: a weight [N, K] or [E, N, K] that is its packed codes and scales.

Inner tensors: `qdata` (split planes, see packing.py), `scale`, `zero_point` (asymmetric formats) and
`per_tensor_scale` (NVFP4). Everything else is derived from `format_name` and the number of columns.
An op that is not handled raises with its name; nothing dequantizes silently.
"""

import hashlib
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from aqtx.formats import kernel
from aqtx.formats.elements import code_to_value
from aqtx.formats.packing import from_disk_order, pack, to_disk_order, unpack
from aqtx.formats.scales import Scales, decode_scale
from aqtx.formats.table import Format, parse
from aqtx.formats.torchao_base import TorchAOBaseTensor


def _source_hash() -> str:
    """Of this package's code: part of the compile cache's key, so that a changed kernel is never served stale."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.[pch]*")):
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


SOURCE_HASH = _source_hash()


def to_storage_dtype(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Dequantized float32 values in `dtype`; finite codes stay finite, NaN stays NaN."""
    largest = min(torch.finfo(dtype).max, torch.finfo(values.dtype).max)
    return values.clamp(-largest, largest).to(dtype)


class QuantizedTensor(TorchAOBaseTensor):  # type: ignore[misc]
    """Packed codes of one format with the logical shape and dtype of the weight they stand for."""

    tensor_data_names: ClassVar = ["qdata"]
    tensor_attribute_names: ClassVar = ["format_name", "num_columns", "orig_dtype"]
    optional_tensor_data_names: ClassVar = ["scale", "zero_point", "per_tensor_scale"]
    optional_tensor_attribute_names: ClassVar[list[str]] = []

    qdata: Tensor
    scale: Tensor | None
    zero_point: Tensor | None
    per_tensor_scale: Tensor | None
    format_name: str
    num_columns: int
    orig_dtype: torch.dtype

    def __new__(  # noqa: D102
        cls, qdata: Tensor, format_name: str, num_columns: int, orig_dtype: torch.dtype, *optional: Any, **named: Any
    ) -> "QuantizedTensor":
        shape = (*qdata.shape[:-1], num_columns)
        made: QuantizedTensor = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=orig_dtype, device=qdata.device, requires_grad=False
        )
        return made

    def __init__(  # noqa: PLR0913 (the base class fixes it: data, attributes, optional data)
        self,
        qdata: Tensor,
        format_name: str,
        num_columns: int,
        orig_dtype: torch.dtype,
        scale: Tensor | None = None,
        zero_point: Tensor | None = None,
        per_tensor_scale: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.qdata, self.format_name, self.num_columns, self.orig_dtype = qdata, format_name, num_columns, orig_dtype
        self.scale, self.zero_point, self.per_tensor_scale = scale, zero_point, per_tensor_scale

    @property
    def format(self) -> Format:
        """The row of the table that this tensor's codes follow."""
        return parse(self.format_name)

    @property
    def scales(self) -> Scales:
        """The stored scales as the codec takes them."""
        assert self.scale is not None
        return Scales(self.scale, self.zero_point, self.per_tensor_scale)

    @property
    def num_bytes(self) -> int:
        """Bytes of the inner tensors in memory."""
        return sum(part.numel() * part.element_size() for part in self._parts().values())

    def codes(self) -> Tensor:
        """uint8 codes [..., N, K], one a byte."""
        return unpack(self.qdata, self.format.element.bits, self.num_columns)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight's values in `dtype` (default: the dtype of the weight that was quantized)."""
        fmt, dtype = self.format, dtype or self.orig_dtype
        if not fmt.is_packed:
            return self.qdata.to(dtype)
        scale, zero_point = decode_scale(self.scales, fmt), self.zero_point
        codes = unpack(self.qdata, fmt.element.bits, self.num_columns)
        size = fmt.block_size(self.num_columns)
        missing = fmt.num_blocks(self.num_columns) * size - self.num_columns
        if missing:
            codes = torch.nn.functional.pad(codes, (0, missing))
        zero = None if zero_point is None else zero_point.unsqueeze(-1)
        values = code_to_value(codes.unflatten(-1, (-1, size)), fmt.element, zero)
        values = (values * scale.unsqueeze(-1)).flatten(-2)
        return to_storage_dtype(values[..., : self.num_columns] if missing else values, dtype)

    def to_disk(self) -> dict[str, Tensor]:
        """Tensors as a checkpoint stores them: row-major codes, low bits first."""
        parts = self._parts()
        if self.format.is_packed:
            parts["qdata"] = to_disk_order(self.codes(), self.format.element.bits)
        return parts

    @classmethod
    def from_disk(
        cls, parts: dict[str, Tensor], format_name: str, shape: tuple[int, ...], dtype: torch.dtype
    ) -> "QuantizedTensor":
        """The inverse of `to_disk`, exact."""
        fmt, qdata = parse(format_name), parts["qdata"]
        if fmt.is_packed:
            qdata = pack(from_disk_order(qdata, fmt.element.bits, shape[-1]), fmt.element.bits)
        optional = [parts.get(name) for name in cls.optional_tensor_data_names]
        return cls(qdata.contiguous(), fmt.name, shape[-1], dtype, *optional)

    def _parts(self) -> dict[str, Tensor]:
        """Inner tensors that are there, by name."""
        found = {name: getattr(self, name) for name in [*self.tensor_data_names, *self.optional_tensor_data_names]}
        return {name: part for name, part in found.items() if part is not None}

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, Any]]:
        """As the base class has it, without its loops: compiled graphs call it for every weight at every step."""
        names = ["qdata"]
        if self.scale is not None:
            names.append("scale")
        if self.zero_point is not None:
            names.append("zero_point")
        if self.per_tensor_scale is not None:
            names.append("per_tensor_scale")
        attributes = {
            "format_name": self.format_name,
            "num_columns": self.num_columns,
            "orig_dtype": self.orig_dtype,
        }
        return names, attributes

    def __repr__(self) -> str:
        return f"QuantizedTensor({self.format_name}, shape={list(self.shape)}, dtype={self.orig_dtype})"

    def _stable_hash_for_caching(self) -> str:
        """Key of torch's compile cache, which would otherwise ignore the code behind the dispatch."""
        parts = [(name, tuple(part.shape), str(part.dtype), str(part.device)) for name, part in self._parts().items()]
        lowering = f"{SOURCE_HASH}|{kernel.serves(self.device)}"
        return f"QuantizedTensor|{lowering}|{self.format_name}|{self.orig_dtype}|{tuple(self.shape)}|{parts}"


torch.serialization.add_safe_globals([QuantizedTensor])

from aqtx.formats import dispatch  # noqa: E402, F401  (registers the ops; it needs the class)
