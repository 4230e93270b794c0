"""Lowerings of `aqtx::grouped_linear` for packed experts.

A stack is a list of buckets, one per format, each [E_b, N, K], and `slots[e]`, the place of expert e in
their concatenation.

dense     dequantize every bucket inside the graph, then the plain op: Inductor fuses the decoding.
          For training on accelerators, and where nearly every expert has tokens.
hit       one opaque op that decodes, when it runs, only the experts that tokens reached: the compiled
          kernel where there is one, else a loop over the hit experts in plain torch.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from aqtx.formats import kernel
from aqtx.formats.decode import Bucket
from aqtx.formats.grouped_linear import group_bounds
from aqtx.formats.packed_linear import KERNEL_DTYPES
from aqtx.formats.table import parse
from aqtx.machine.half_products import mm

_lowering: ContextVar[str] = ContextVar("aqtx_lowering", default="auto")


@contextmanager
def lowering(name: str) -> Iterator[None]:
    """Choose `dense`, `hit` or `auto` (hit on a CPU, dense elsewhere) for what is traced or run inside."""
    if name not in ("auto", "dense", "hit"):
        raise ValueError(f"no lowering {name!r}: auto, dense or hit")
    token = _lowering.set(name)
    try:
        yield
    finally:
        _lowering.reset(token)


def current_lowering() -> str:
    """The name that `lowering` set; part of the compile cache's key."""
    return _lowering.get()


def lower(x: Tensor, buckets: Sequence[Bucket], slots: list[int], offsets: Tensor) -> Tensor:
    """The grouped linear of packed experts, by the chosen lowering."""
    choice = _lowering.get()
    if choice == "dense" or (choice == "auto" and x.device.type != "cpu"):
        return dense_product(x, dequantize_all(buckets, slots, x.dtype), offsets)
    num_outputs = buckets[0].parts["qdata"].shape[1]
    known = all(kernel.decodes(bucket.fmt) for bucket in buckets)
    if known and x.dtype in KERNEL_DTYPES and kernel.serves(x.device):
        parts = [part.contiguous() for bucket in buckets for part in bucket.parts.values()]
        specs = [number for bucket in buckets for number in kernel.spec_of(bucket.fmt, bucket.num_columns)]
        return torch.ops.aqtx_cpu.grouped(x, offsets, parts, specs, slots, num_outputs)
    parts, layout = _describe(buckets)
    return torch.ops.aqtx.grouped_linear_hit(x, offsets, parts, layout, slots, num_outputs)


def dequantize_all(buckets: Sequence[Bucket], slots: list[int], dtype: torch.dtype) -> Tensor:
    """[E, N, K] in the experts' order."""
    dense = [bucket.dequantize(dtype) for bucket in buckets]
    if slots == sorted(slots):
        return torch.cat(dense) if len(dense) > 1 else dense[0]
    experts = [expert for stack in dense for expert in stack.unbind(0)]
    return torch.stack([experts[slot] for slot in slots])


def dense_product(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """`grouped_linear` of a plain stack; on a GPU in bf16 by torch's own op, which compiles without Python."""
    if x.device.type == "cuda" and x.dtype is torch.bfloat16:
        return torch.nn.functional.grouped_mm(x, weight.transpose(1, 2), offs=offsets)
    return torch.ops.aqtx.grouped_linear(x, weight, offsets)


def _describe(buckets: Sequence[Bucket]) -> tuple[list[Tensor], str]:
    """Buckets as a flat list of plain tensors and a string that says what they are."""
    parts = [part for bucket in buckets for part in bucket.parts.values()]
    rows = [f"{bucket.fmt.name}:{bucket.num_columns}:{'+'.join(bucket.parts)}" for bucket in buckets]
    return parts, ",".join(rows)


def _rebuild(parts: list[Tensor], layout: str) -> list[Bucket]:
    """The inverse of `_describe`."""
    remaining, buckets = iter(parts), []
    for row in layout.split(","):
        name, num_columns, present = row.split(":")
        buckets.append(Bucket(parse(name), int(num_columns), {part: next(remaining) for part in present.split("+")}))
    return buckets


@torch.library.custom_op("aqtx::grouped_linear_hit", mutates_args=())
def grouped_linear_hit(
    x: Tensor, offsets: Tensor, parts: list[Tensor], layout: str, slots: list[int], num_outputs: int
) -> Tensor:
    """`grouped_linear` that decodes only the experts that have rows; `parts` and `layout` are the buckets."""
    out = x.new_empty(x.shape[0], num_outputs)
    places = [(bucket, index) for bucket in _rebuild(parts, layout) for index in range(bucket.num_experts)]
    for expert, start, end in group_bounds(offsets):
        bucket, index = places[slots[expert]]
        weight = bucket.expert(index).dequantize(x.dtype)[0]
        mm(x[start:end], weight.t(), out=out[start:end])
    return out


@grouped_linear_hit.register_fake
def _(x: Tensor, offsets: Tensor, parts: list[Tensor], layout: str, slots: list[int], num_outputs: int) -> Tensor:
    return x.new_empty(x.shape[0], num_outputs)
