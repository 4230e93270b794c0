"""`aqtx_cpu::experts` as a graph calls it: three stacks of experts, of whatever formats, as flat lists.

The op runs a layer's chosen experts, from hidden states to their weighted sum, without a dispatch for each matrix.
"""

from dataclasses import dataclass

from torch import Tensor

from aqtx.formats import kernel
from aqtx.formats.decode import Bucket
from aqtx.formats.mixed import UNQUANTIZED, MixedExperts
from aqtx.formats.table import parse
from aqtx.formats.tensor import QuantizedTensor


@dataclass(frozen=True)
class Stacks:
    """The stacks of gate, up and down one behind the other; see kernels/register_experts.cpp."""

    parts: list[Tensor]
    specs: list[int]
    slots: list[int]
    buckets: list[int]
    inner: int


def buckets_of(stack: Tensor) -> tuple[list[Bucket], list[int]]:
    """A stack [E, N, K], packed or plain, as buckets by format, and each expert's place in them."""
    if isinstance(stack, MixedExperts):
        return stack.stacks(), list(stack.slots)
    order = list(range(stack.shape[0]))
    if isinstance(stack, QuantizedTensor):
        return [stack.bucket()], order
    return [Bucket(parse(UNQUANTIZED), stack.shape[-1], {"qdata": stack})], order


def described(gate: Tensor, up: Tensor, down: Tensor) -> Stacks | None:
    """Gate and up [E, I, H] and down [E, H, I] as the op takes them; None where the kernel does not decode them all."""
    made = Stacks([], [], [], [], gate.shape[1])
    for stack in (gate, up, down):
        buckets, slots = buckets_of(stack)
        if not all(kernel.decodes(bucket.fmt) for bucket in buckets):
            return None
        for bucket in buckets:
            made.parts.extend(part.contiguous() for part in bucket.parts.values())
            made.specs.extend(kernel.spec_of(bucket.fmt, bucket.num_columns))
        made.slots.extend(slots)
        made.buckets.append(len(buckets))
    return made
