"""`aqtx::hadamard`: the one node that rotates a linear's input while the model runs.

The op is composite: eager code and compilers see a scaling, which fuses with what comes before, and one
or two small GEMMs with matrices of ±1 that are buffers of the graph. ±1 is exact in every dtype, so
the scale, which is not, is applied to the activation and no dtype has a systematic error.
"""

import torch
from torch import Tensor

from aqtx.numerics.hadamard import factors, rotate

_LIBRARY = torch.library.Library("aqtx", "FRAGMENT")
_LIBRARY.define("hadamard(Tensor x, Tensor left, Tensor? right=None) -> Tensor")


def _hadamard(x: Tensor, left: Tensor, right: Tensor | None = None) -> Tensor:
    """Rotate the last dimension of `x` by `left`, or by `left` kron `right`, block by block."""
    return rotate(x, (left,) if right is None else (left, right))


_LIBRARY.impl("hadamard", _hadamard, "CompositeImplicitAutograd")

OP = torch.ops.aqtx.hadamard.default


def buffer_names(block: int, seed: int | None) -> list[str]:
    """Names of the buffers that hold a rotation's matrices."""
    stem = f"hadamard_{block}" if seed is None else f"hadamard_{block}_{seed}"
    return [f"{stem}_{place}" for place, _ in zip(("left", "right"), factors(block, seed), strict=False)]


def buffers(block: int, seed: int | None, dtype: torch.dtype) -> dict[str, Tensor]:
    """The matrices of a rotation by buffer name, in the dtype that the graph computes in."""
    return {
        name: factor.to(dtype) for name, factor in zip(buffer_names(block, seed), factors(block, seed), strict=True)
    }
