"""The ops that structural edits put before a linear, for modules instead of graphs.

A graph has the op as a node before the linear; a module of transformers gets it as a pre-hook, and
fused experts ask for it by the name of their projection.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

Operation = Callable[[Tensor, Tensor | None], Tensor]  # input, offsets of the experts' rows -> input


class InputOps(nn.Module):
    """What stands before one linear: ops in the order of their edits, and the buffers that they read."""

    def __init__(self, edits: Iterable[dict[str, Any]], dtype: torch.dtype) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        for edit in edits:
            KINDS[edit["edit"]](self, edit, dtype)

    def forward(self, x: Tensor, offsets: Tensor | None = None) -> Tensor:
        """x [..., K] as the linear reads it."""
        for operation in self.operations:
            x = operation(x, offsets)
        return x


def _quantize_activation(ops: InputOps, edit: dict[str, Any], dtype: torch.dtype) -> None:
    from aqtx.formats.activation import quantize_activation, quantize_activation_grouped

    names = edit["formats"]

    def quantize(x: Tensor, offsets: Tensor | None) -> Tensor:
        if len(set(names)) == 1:
            return quantize_activation(x, names[0])
        assert offsets is not None
        return quantize_activation_grouped(x, offsets, ",".join(names))

    ops.operations.append(quantize)


def _hadamard(ops: InputOps, edit: dict[str, Any], dtype: torch.dtype) -> None:
    from aqtx.program.hadamard_op import OP, buffers

    made = buffers(edit["block"], edit["seed"], dtype)
    for name, value in made.items():
        ops.register_buffer(name, value, persistent=False)

    def rotate(x: Tensor, offsets: Tensor | None) -> Tensor:
        rotated: Tensor = OP(x, *(getattr(ops, name) for name in made))
        return rotated

    ops.operations.insert(0, rotate)  # before the quantization of the input, whichever edit came first


def _remove_hadamard(ops: InputOps, edit: dict[str, Any], dtype: torch.dtype) -> None:
    ops.operations.pop(0)


KINDS: dict[str, Callable[[InputOps, dict[str, Any], torch.dtype], None]] = {
    "quantize_activation": _quantize_activation,
    "hadamard": _hadamard,
    "remove_hadamard": _remove_hadamard,
}
