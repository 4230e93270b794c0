"""Changes of weights that are made when a weight is read: gains folded in, rotations.

A store keeps them as a list by parameter. They act in float64 on the weight as it lies on disk, so
that a rotated model larger than memory needs no memory of its own, and each matrix is rounded once,
by whoever asked for it, however many passes changed it before.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from aqtx.numerics.hadamard import hadamard


@dataclass(frozen=True, eq=False)
class Scale:
    """Multiply each input (last dimension) or output (last but one) by its factor."""

    vector: Tensor
    outputs: bool = False

    def __call__(self, value: Tensor) -> Tensor:
        """The changed value, float64 [..., N, K]."""
        vector = self.vector.to(value.device, value.dtype)
        return value * (vector.unsqueeze(-1) if self.outputs and value.dim() > 1 else vector)


@dataclass(frozen=True)
class Rotate:
    """Rotate inputs, W -> W Q, or outputs, W -> Q^T W; Q is the Hadamard rotation of a block and a seed."""

    block: int
    seed: int | None
    outputs: bool = False

    def __call__(self, value: Tensor) -> Tensor:
        """The changed value, float64 [..., N, K]; a vector (bias) has only its last dimension."""
        if self.outputs and value.dim() > 1:
            return hadamard(value.mT, self.block, seed=self.seed).mT
        return hadamard(value, self.block, seed=self.seed)


Change = Scale | Rotate


def to_json(change: Change, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """A change as JSON; its vector goes into `tensors`, once however many changes share it."""
    if isinstance(change, Rotate):
        return {"block": change.block, "seed": change.seed, "outputs": change.outputs}
    known = next((key for key, tensor in tensors.items() if tensor is change.vector), None)
    key = known or f"vector.{len(tensors)}"
    tensors[key] = change.vector
    return {"vector": key, "outputs": change.outputs}


def from_json(told: dict[str, Any], tensors: dict[str, Tensor]) -> Change:
    """The change that `to_json` told."""
    if "vector" in told:
        return Scale(tensors[told["vector"]], told["outputs"])
    return Rotate(told["block"], told["seed"], told["outputs"])


def make(changes: list[Change], value: Tensor) -> Tensor:
    """A value after changes, in float64 inside and out."""
    value = value.double()
    for change in changes:
        value = change(value)
    return value
