"""What torch's ops do with a `QuantizedTensor`.

Linears are lowered by `aqtx.formats.packed_linear`; views exist along leading dimensions only, because the
columns are packed. Whatever is not listed here raises in the base class with the op's name.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing

from aqtx.formats import grouped_linear_packed, packed_linear
from aqtx.formats.tensor import QuantizedTensor

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
    return grad @ weight.dequantize(grad.dtype)


@implements(torch.ops.aqtx.grouped_linear.default)
def _grouped_linear(func: Any, types: Any, args: Args, kwargs: Named) -> Tensor:
    x, weight, offsets = args
    return grouped_linear_packed.lower(x, [weight], list(range(weight.shape[0])), offsets)


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
    scale, zero_point = (None if part is None else view(part) for part in (tensor.scale, tensor.zero_point))
    return QuantizedTensor(
        view(tensor.qdata), tensor.format_name, tensor.num_columns, tensor.orig_dtype, scale, zero_point, per_tensor
    )


def _optional(tensor: QuantizedTensor) -> tuple[Tensor | None, ...]:
    return tensor.scale, tensor.zero_point, tensor.per_tensor_scale
