"""The ops that structural edits put before a linear, for modules instead of graphs.

A graph has the op as a node before the linear; a module of transformers gets it as a pre-hook, and
fused experts ask for it by the name of their projection.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from aqtx.program.edits import Edit, in_force


class InputOps(nn.Module):
    """What stands before one linear: the ops of the edits in force, and the buffers that they read."""

    def __init__(self, edits: Iterable[Edit], dtype: torch.dtype) -> None:
        super().__init__()
        running = in_force(edits)
        for edit in running:
            for name, value in edit.buffers(dtype).items():
                self.register_buffer(name, value, persistent=False)
        self.operations = [edit.operation(self.get_buffer) for edit in running]

    def forward(self, x: Tensor, offsets: Tensor | None = None) -> Tensor:
        """x [..., K] as the linear reads it."""
        for operation in self.operations:
            x = operation(x, offsets)
        return x
