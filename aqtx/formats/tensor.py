"""`QuantizedTensor`: a weight [N, K] or [E, N, K] that is its packed codes and scales.

Inner tensors: `qdata` (split planes, see packing.py), `scale`, `zero_point` (asymmetric formats),
`per_tensor_scale` (NVFP4) and `super_scale` (K-quants). Everything else is derived from `format_name` and the number of
columns. An op that is not handled raises with its name; nothing dequantizes silently.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing

from aqtx.formats import grouped_linear_packed, kernel, packed_linear, part_shapes
from aqtx.formats.decode import PARTS, Bucket, decode
from aqtx.formats.packing import from_disk_order, pack, to_disk_order, unpack
from aqtx.formats.scales import Scales
from aqtx.formats.table import Format, parse
from aqtx.formats.torchao_base import TorchAOBaseTensor
from aqtx.machine.half_products import matmul


def _source_hash() -> str:
    """Of this package's code: part of the compile cache's key, so that a changed kernel is never served stale."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.[pch]*")):
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


SOURCE_HASH = _source_hash()


class QuantizedTensor(TorchAOBaseTensor):  # type: ignore[misc]
    """Packed codes of one format with the logical shape and dtype of the weight they stand for."""

    tensor_data_names: ClassVar = ["qdata"]
    tensor_attribute_names: ClassVar = ["format_name", "num_columns", "orig_dtype"]
    optional_tensor_data_names: ClassVar = ["scale", "zero_point", "per_tensor_scale", "super_scale"]
    optional_tensor_attribute_names: ClassVar[list[str]] = []

    qdata: Tensor
    scale: Tensor | None
    zero_point: Tensor | None
    per_tensor_scale: Tensor | None
    super_scale: Tensor | None
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
        super_scale: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.qdata, self.format_name, self.num_columns, self.orig_dtype = qdata, format_name, num_columns, orig_dtype
        self.scale, self.zero_point, self.per_tensor_scale = scale, zero_point, per_tensor_scale
        self.super_scale = super_scale
        part_shapes.check(self.parts(), self.format, tuple(self.shape))

    @property
    def format(self) -> Format:
        """The row of the table that this tensor's codes follow."""
        return parse(self.format_name)

    @property
    def scales(self) -> Scales:
        """The stored scales as the codec takes them."""
        assert self.scale is not None
        return Scales(self.scale, self.zero_point, self.per_tensor_scale, self.super_scale)

    @property
    def num_bytes(self) -> int:
        """Bytes of the inner tensors in memory."""
        return sum(part.numel() * part.element_size() for part in self.parts().values())

    def codes(self) -> Tensor:
        """uint8 codes [..., N, K], one a byte."""
        return unpack(self.qdata, self.format.element.bits, self.num_columns)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight's values in `dtype` (default: the dtype of the weight that was quantized)."""
        return decode(self.parts(), self.format, self.num_columns, dtype or self.orig_dtype)

    def to_disk(self) -> dict[str, Tensor]:
        """Tensors as a checkpoint stores them: row-major codes, low bits first."""
        parts = self.parts()
        if self.format.is_packed:
            parts["qdata"] = to_disk_order(self.codes(), self.format.element.bits)
        if bits := self.format.scale.code_bits:
            parts["scale"] = to_disk_order(parts["scale"], bits)
        return parts

    @classmethod
    def from_disk(
        cls, parts: dict[str, Tensor], format_name: str, shape: tuple[int, ...], dtype: torch.dtype
    ) -> "QuantizedTensor":
        """The inverse of `to_disk`, exact. InputError where a part is missing or has another size or dtype."""
        fmt = parse(format_name)
        part_shapes.check(parts, fmt, shape, on_disk=True)
        qdata = parts["qdata"]
        if fmt.is_packed:
            qdata = pack(from_disk_order(qdata, fmt.element.bits, shape[-1]), fmt.element.bits)
        if bits := fmt.scale.code_bits:
            parts = {**parts, "scale": from_disk_order(parts["scale"], bits, fmt.num_scale_codes(shape[-1]))}
        optional = [parts[name].contiguous() if name in parts else None for name in cls.optional_tensor_data_names]
        return cls(qdata.contiguous(), fmt.name, shape[-1], dtype, *optional)

    def parts(self) -> dict[str, Tensor]:
        """Inner tensors that are there, by name."""
        found = {name: getattr(self, name) for name in PARTS}
        return {name: part for name, part in found.items() if part is not None}

    def bucket(self) -> Bucket:
        """A stack [E, N, K] as the grouped ops take it."""
        return Bucket(self.format, self.num_columns, self.parts())

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, Any]]:
        """As the base class has it, without its loops: compiled graphs call it for every weight at every step."""
        names = ["qdata"]
        if self.scale is not None:
            names.append("scale")
        if self.zero_point is not None:
            names.append("zero_point")
        if self.per_tensor_scale is not None:
            names.append("per_tensor_scale")
        if self.super_scale is not None:
            names.append("super_scale")
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
        parts = [(name, tuple(part.shape), str(part.dtype), str(part.device)) for name, part in self.parts().items()]
        lowering = f"{SOURCE_HASH}|{kernel.serves(self.device)}"
        return f"QuantizedTensor|{lowering}|{self.format_name}|{self.orig_dtype}|{tuple(self.shape)}|{parts}"


torch.serialization.add_safe_globals([QuantizedTensor])


def dequantized(value: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A weight's values, packed (`QuantizedTensor`, `MixedExperts`) or plain; None keeps the dtype it stands for."""
    if isinstance(value, TorchAOBaseTensor):
        unpacked: Tensor = value.dequantize(dtype)
        return unpacked
    return value if dtype is None else value.to(dtype)


# What torch's ops do with it. Linears are lowered by `packed_linear` and `grouped_linear_packed`; views exist along
# leading dimensions only, because columns are packed. What is not listed raises in the base class with the op's name.

aten = torch.ops.aten
Args = tuple[Any, ...]
Named = dict[str, Any]
implements: Callable[[Any], Callable[[Any], Any]] = QuantizedTensor.implements
implements_torch_function: Callable[[Any], Callable[[Any], Any]] = QuantizedTensor.implements_torch_function


@implements_torch_function([F.linear, aten.linear.default, aten.linear])
def _linear_function(func: Any, types: Any, args: Args, kwargs: Named) -> Tensor:
    return torch.ops.aqtx.quantized_linear(*packed_linear.arguments(args, kwargs))


@implements([aten.linear.default, torch.ops.aqtx.quantized_linear.default])
def _linear(func: Any, types: Any, args: Args, kwargs: Named) -> Tensor:
    return packed_linear.lower(*packed_linear.arguments(args, kwargs))


@implements(torch.ops.aqtx.quantized_linear_grad_input.default)
def _linear_grad_input(func: Any, types: Any, args: Args, kwargs: Named) -> Tensor:
    grad, weight = args
    return matmul(grad, weight.dequantize(grad.dtype))


@implements(torch.ops.aqtx.grouped_linear.default)
def _grouped_linear(func: Any, types: Any, args: Args, kwargs: Named) -> Tensor:
    x, weight, offsets = args
    return grouped_linear_packed.lower(x, [weight.bucket()], list(range(weight.shape[0])), offsets)


@implements(torch.ops.aqtx.grouped_linear_grad_input.default)
def _grouped_linear_grad_input(func: Any, types: Any, args: Args, kwargs: Named) -> Tensor:
    grad, weight, offsets = args
    return func(grad, weight.dequantize(grad.dtype), offsets)


@implements(aten._to_copy.default)
def _to_copy(func: Any, types: Any, args: Args, kwargs: Named) -> Any:
    """Honours `dtype`, which is the dtype that the tensor stands for: codes and scales keep theirs."""
    tensor = args[0]
    wanted = tensor._get_to_kwargs(*args[1:], **kwargs)
    moved = tensor._apply_fn_to_data(lambda part: part.to(wanted["device"], non_blocking=wanted["non_blocking"]))
    made = QuantizedTensor(moved.qdata, tensor.format_name, tensor.num_columns, wanted["dtype"], *_optional(moved))
    return return_and_correct_aliasing(func, args, kwargs, made)


@implements([aten.select.int, aten.slice.Tensor])
def _view_of_leading(func: Any, types: Any, args: Args, kwargs: Named) -> Any:
    tensor, dim = args[0], (args[1] if len(args) > 1 else 0) % args[0].dim()
    kept_dims = tensor.dim() - (func is aten.select.int)
    if dim == tensor.dim() - 1 or kept_dims < 2:
        raise NotImplementedError(f"{func} on dimension {dim} of {tensor}: only experts and rows can be sliced")
    if func is aten.select.int and dim == tensor.dim() - 2 and tensor.per_tensor_scale is not None:
        raise NotImplementedError(f"{func} of one row of each matrix of {tensor}: their rows share a scale per matrix")
    return return_and_correct_aliasing(func, args, kwargs, _on_leading(tensor, dim, lambda p: func(p, *args[1:])))


@implements(aten.index_select.default)
def _index_select(func: Any, types: Any, args: Args, kwargs: Named) -> Any:
    tensor, dim, index = args
    if dim % tensor.dim() == tensor.dim() - 1:
        raise NotImplementedError(f"{func} on the packed columns of {tensor}")
    return _on_leading(tensor, dim % tensor.dim(), lambda part: func(part, dim, index))


def _on_leading(tensor: QuantizedTensor, dim: int, view: Callable[[Tensor], Tensor]) -> QuantizedTensor:
    """The same view of every inner tensor; NVFP4's scale per matrix has no rows to cut."""
    per_tensor = tensor.per_tensor_scale
    if per_tensor is not None and dim < tensor.dim() - 2:
        per_tensor = view(per_tensor)
    rows = (tensor.scale, tensor.zero_point, tensor.super_scale)
    scale, zero_point, supers = (None if part is None else view(part) for part in rows)
    kept = (tensor.format_name, tensor.num_columns, tensor.orig_dtype)
    return QuantizedTensor(view(tensor.qdata), *kept, scale, zero_point, per_tensor, supers)


def _optional(tensor: QuantizedTensor) -> tuple[Tensor | None, ...]:
    return tensor.scale, tensor.zero_point, tensor.per_tensor_scale, tensor.super_scale
