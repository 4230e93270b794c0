"""GPTQ's rounding of columns in order, each error made good by the columns that follow.

Legend: E experts solved as one batch, N rows, K columns, B blocks under one scale each.
Everything is laid out [K, E, N]: a column of all experts and rows is one contiguous slice, so the
sequential part is a dozen elementwise calls per column whatever E is. Columns are halved
recursively: the right half receives the left half's errors in one matrix product before it starts,
and only within a leaf of a few columns are errors passed on one column at a time. The result is
the plain algorithm's up to the order of additions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aqtx.formats.codec import Scales, decode_scale, snap
from aqtx.formats.table import Format


@dataclass(frozen=True)
class Grid:
    """The values that each weight may take, fixed before any rounding: scale and zero point [B, E, N]."""

    fmt: Format
    block: int
    scale: Tensor
    zero_point: Tensor | None
    experts: Tensor  # 0, 1, ..., E - 1

    @classmethod
    def of(cls, scales: Scales, fmt: Format, num_columns: int) -> "Grid":
        """From the stored scales of a [E, N, K] weight."""
        zero_point = None if scales.zero_point is None else _blocks_first(scales.zero_point.to(torch.float32))
        scale = _blocks_first(decode_scale(scales, fmt))
        experts = torch.arange(scale.shape[1], device=scale.device)
        return cls(fmt, fmt.block_size(num_columns), scale, zero_point, experts)

    def snap(self, values: Tensor, block: int | Tensor) -> Tensor:
        """Nearest values: [..., E, N], all in block number `block`, or in block `block[e]` for expert e."""
        place = block if isinstance(block, int) else (block, self.experts)
        zero_point = None if self.zero_point is None else self.zero_point[place]
        return snap(values, self.fmt, self.scale[place], zero_point)

    def nearest(self, weights: Tensor) -> Tensor:
        """Round-to-nearest of weights [K, E, N] in their stored order."""
        pieces = weights.split(self.block)
        return torch.cat([self.snap(piece, block) for block, piece in enumerate(pieces)])


def _blocks_first(x: Tensor) -> Tensor:
    """[E, N, B] -> [B, E, N]."""
    return x.permute(2, 0, 1).contiguous()


def columns_first(x: Tensor) -> Tensor:
    """[E, N, K] -> [K, E, N]; as a transpose of two dimensions, for which torch has a blocked copy."""
    return x.reshape(-1, x.shape[-1]).t().contiguous().view(x.shape[-1], *x.shape[:2])


def columns_last(x: Tensor) -> Tensor:
    """[K, E, N] -> [E, N, K]."""
    return x.flatten(1).t().contiguous().view(*x.shape[1:], len(x))


def reorder(x: Tensor, order: Tensor) -> Tensor:
    """Columns of each expert of x [K, E, N] in `order` [E, K]."""
    return x[order.t(), torch.arange(x.shape[1], device=x.device)]


@dataclass(frozen=True)
class Columns:
    """One batch on its way: weights as given, values (rounded as far as columns are done), and their difference."""

    weights: Tensor
    values: Tensor
    errors: Tensor
    ratios: Tensor  # [E, K, K] of the factor, in the same order
    grid: Grid
    blocks: Sequence[int | Tensor]  # block number of each column, [E] where experts differ
    block_size: int

    def round(self, low: int, high: int) -> None:
        """Round the columns from `low` up to `high`, whose errors from earlier columns are made good already."""
        if high - low <= self.block_size:
            self._round_leaf(low, high)
            return
        leaves = -(-(high - low) // self.block_size)
        middle = low + (leaves + 1) // 2 * self.block_size
        self.round(low, middle)
        ratios = self.ratios[:, low:middle, middle:high].transpose(1, 2)
        self.values[middle:high].transpose(0, 1).baddbmm_(ratios, self.errors[low:middle].transpose(0, 1))
        self.round(middle, high)

    def _round_leaf(self, low: int, high: int) -> None:
        """One column at a time, its error passed on within the leaf."""
        ratios = self.ratios[:, low:high, low:high].permute(1, 2, 0).unsqueeze(-1).contiguous()  # [row, column, E, 1]
        for column in range(low, high):
            rounded = self.grid.snap(self.values[column], self.blocks[column])
            error = torch.sub(self.weights[column], rounded, out=self.errors[column])
            self.values[column] = rounded
            if column + 1 < high:
                self.values[column + 1 : high].addcmul_(ratios[column - low, column - low + 1 :], error)


def round_columns(weights: Tensor, ratios: Tensor, grid: Grid, order: Tensor | None, block_size: int) -> Tensor:
    """Values on the grid for weights [K, E, N] in `order`, given the factor's ratios in that order."""
    blocks: Sequence[int | Tensor] = [column // grid.block for column in range(len(weights))]
    if order is not None:
        numbers = (order // grid.block).t().contiguous()
        blocks = [int(number) for number in numbers] if weights.shape[1] == 1 else list(numbers)
    work = Columns(weights, weights.clone(), torch.empty_like(weights), ratios, grid, blocks, block_size)
    work.round(0, len(weights))
    return work.values
