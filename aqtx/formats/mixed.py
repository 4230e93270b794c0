"""`MixedExperts`: a stack [E, N, K] whose experts have different formats, as one parameter.

Experts of one format form a bucket, stacked; `slots[e]` is expert e's place in the concatenation of
the buckets. The graph holds one `aqtx::grouped_linear` whatever the mix.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing

from aqtx.errors import InputError
from aqtx.formats import grouped_linear_packed
from aqtx.formats.decode import PARTS, Bucket
from aqtx.formats.table import parse
from aqtx.formats.tensor import SOURCE_HASH, QuantizedTensor
from aqtx.formats.torchao_base import TorchAOBaseTensor

aten = torch.ops.aten
UNQUANTIZED = "bf16"


class MixedExperts(TorchAOBaseTensor):  # type: ignore[misc]
    """One bucket per format, [E_b, N, K] each (a plain tensor for unquantized experts), and their order."""

    def __new__(cls, buckets: list[Any], slots: tuple[int, ...], orig_dtype: torch.dtype) -> "MixedExperts":  # noqa: D102
        shape = (len(slots), *buckets[0].shape[1:])
        made: MixedExperts = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=orig_dtype, device=buckets[0].device, requires_grad=False
        )
        return made

    def __init__(self, buckets: list[Any], slots: tuple[int, ...], orig_dtype: torch.dtype) -> None:
        super().__init__()
        self.slots, self.orig_dtype, self.num_buckets = tuple(slots), orig_dtype, len(buckets)
        _check(buckets, self.slots)
        for index, bucket in enumerate(buckets):
            setattr(self, f"bucket{index}", bucket)

    @classmethod
    def from_experts(cls, experts: list[Any], dtype: torch.dtype) -> "MixedExperts":
        """Stack 2-D experts, `QuantizedTensor` or plain, bucket by bucket in order of first appearance."""
        shapes = {tuple(expert.shape) for expert in experts}
        if len(shapes) != 1:
            raise InputError(f"experts of one stack must share a shape, got {sorted(shapes)}")
        groups: dict[str, list[int]] = {}
        for index, expert in enumerate(experts):
            key = expert.format_name if isinstance(expert, QuantizedTensor) else f"plain {expert.dtype}"
            groups.setdefault(key, []).append(index)
        order = [index for members in groups.values() for index in members]
        slots = [0] * len(order)
        for slot, index in enumerate(order):
            slots[index] = slot
        buckets = [_stack([experts[index] for index in members]) for members in groups.values()]
        return cls(buckets, tuple(slots), dtype)

    def __dir__(self) -> list[str]:
        """With buckets that this stack lacks and another may have: torch.export asks one stack for the names of all."""
        return [*super().__dir__(), *(f"bucket{index}" for index in range(len(self.slots)))]

    @property
    def buckets(self) -> list[Any]:
        """The stacked buckets."""
        return [getattr(self, f"bucket{index}") for index in range(self.num_buckets)]

    def stacks(self) -> list[Bucket]:
        """The buckets as the grouped ops take them."""
        return [
            bucket.bucket()
            if isinstance(bucket, QuantizedTensor)
            else Bucket(parse(UNQUANTIZED), bucket.shape[-1], {"qdata": bucket})
            for bucket in self.buckets
        ]

    def expert(self, index: int) -> Any:
        """Expert `index` [N, K] as it is stored: a `QuantizedTensor` or a plain tensor."""
        slot = self.slots[index]
        for bucket in self.buckets:
            if slot < bucket.shape[0]:
                return bucket[slot]
            slot -= bucket.shape[0]
        raise IndexError(index)

    @property
    def formats(self) -> list[str]:
        """Format name of each expert; plain tensors are `bf16`."""
        by_slot = [
            getattr(bucket, "format_name", UNQUANTIZED) for bucket in self.buckets for _ in range(bucket.shape[0])
        ]
        return [by_slot[slot] for slot in self.slots]

    @property
    def num_bytes(self) -> int:
        """Bytes of all buckets in memory."""
        sizes = [
            bucket.num_bytes if isinstance(bucket, QuantizedTensor) else bucket.numel() * bucket.element_size()
            for bucket in self.buckets
        ]
        return sum(sizes)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """[E, N, K] in the experts' order."""
        return grouped_linear_packed.dequantize_all(self.stacks(), list(self.slots), dtype or self.orig_dtype)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return [f"bucket{index}" for index in range(self.num_buckets)], (self.slots, self.orig_dtype)

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Any], context: Any, outer_size: Any, outer_stride: Any) -> Any:
        return cls([inner[f"bucket{index}"] for index in range(len(inner))], *context)

    def _apply_fn_to_data(self, fn: Any) -> "MixedExperts":
        return MixedExperts([fn(bucket) for bucket in self.buckets], self.slots, self.orig_dtype)

    def __repr__(self) -> str:
        return f"MixedExperts({', '.join(self.formats)}, shape={list(self.shape)}, dtype={self.orig_dtype})"

    def _stable_hash_for_caching(self) -> str:
        keys = [
            bucket._stable_hash_for_caching()
            if isinstance(bucket, QuantizedTensor)
            else f"{bucket.dtype}|{tuple(bucket.shape)}|{bucket.device}"
            for bucket in self.buckets
        ]
        lowering = grouped_linear_packed.current_lowering()
        return f"MixedExperts|{SOURCE_HASH}|{lowering}|{self.slots}|{self.orig_dtype}|{keys}"


implements: Callable[[Any], Callable[[Any], Any]] = MixedExperts.implements


def _check(buckets: list[Any], slots: tuple[int, ...]) -> None:
    """InputError unless the buckets are stacks of matrices of one shape and `slots` names each of them once."""
    shapes = sorted({tuple(bucket.shape[1:]) for bucket in buckets})
    if len(shapes) != 1 or len(shapes[0]) != 2:
        raise InputError(f"experts of one stack must be matrices of one shape, got {shapes}")
    num_experts = sum(bucket.shape[0] for bucket in buckets)
    if sorted(slots) != list(range(num_experts)):
        raise InputError(f"the slots of {num_experts} experts must name each once, not {list(slots)}")


def _stack(experts: list[Any]) -> Any:
    """2-D tensors of one kind as one 3-D tensor of that kind."""
    first = experts[0]
    if not isinstance(first, QuantizedTensor):
        return torch.stack(experts)
    parts = {}
    for name in PARTS:
        if getattr(first, name) is not None:
            parts[name] = torch.stack([getattr(expert, name) for expert in experts])
    return QuantizedTensor(parts.pop("qdata"), first.format_name, first.num_columns, first.orig_dtype, **parts)


@implements([aten.detach.default, aten.clone.default, aten.alias.default, aten.contiguous.default])
def _same_for_all(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    made = args[0]._apply_fn_to_data(lambda bucket: func(bucket, *args[1:], **kwargs))
    return return_and_correct_aliasing(func, args, kwargs, made)


@implements(aten._to_copy.default)
def _to_copy(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    stack = args[0]
    wanted = stack._get_to_kwargs(*args[1:], **kwargs)
    moved = [
        func(bucket, device=wanted["device"], dtype=wanted["dtype"], non_blocking=wanted["non_blocking"])
        for bucket in stack.buckets
    ]
    return return_and_correct_aliasing(func, args, kwargs, MixedExperts(moved, stack.slots, wanted["dtype"]))


@implements(aten.copy_.default)
def _copy(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    target, source = args[0], args[1]
    if not isinstance(source, MixedExperts) or (target.formats, target.slots) != (source.formats, source.slots):
        raise ValueError(f"cannot copy {source} into {target}: their formats differ")
    for mine, theirs in zip(target.buckets, source.buckets, strict=True):
        mine.copy_(theirs)
    return target


@implements(aten.select.int)
def _select(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    stack, dim, index = args
    if dim % stack.dim() != 0:
        raise NotImplementedError(f"{func} on dimension {dim} of {stack}: only experts can be selected")
    expert = stack.expert(index)
    return expert if expert.dtype is stack.orig_dtype else aten._to_copy.default(expert, dtype=stack.orig_dtype)


@implements(torch.ops.aqtx.grouped_linear.default)
def _grouped_linear(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    x, stack, offsets = args
    return grouped_linear_packed.lower(x, stack.stacks(), list(stack.slots), offsets)


@implements(torch.ops.aqtx.grouped_linear_grad_input.default)
def _grouped_linear_grad_input(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    grad, stack, offsets = args
    return func(grad, stack.dequantize(grad.dtype), offsets)


torch.serialization.add_safe_globals([MixedExperts])
