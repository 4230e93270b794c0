"""GPTQ's rounding of columns in order, each error made good by the columns that follow.

Legend: E experts solved as one batch, N rows, K columns, G blocks under one scale each.
Columns are halved recursively: the right half receives the left half's errors in one matrix product
before it starts, and only within a leaf of a few columns are errors passed on one column at a time. A
leaf is one call of the compiled kernel, or a dozen elementwise calls per column on all experts and
rows at once; both give the same bits. The result is the plain algorithm's up to the order of additions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aqtx.formats import kernel
from aqtx.formats.codec import Scales, decode_scale, snap
from aqtx.formats.table import Format
from aqtx.numerics.cholesky import Factor
from aqtx.numerics.rows import SLACK


@dataclass(frozen=True)
class Grid:
    """The values that each weight may take, fixed before any rounding: scale and zero point [E, N, G]."""

    fmt: Format
    block: int
    scale: Tensor
    zero_point: Tensor | None

    @classmethod
    def of(cls, scales: Scales, fmt: Format, num_columns: int) -> "Grid":
        """From the stored scales of a [E, N, K] weight."""
        zero_point = None if scales.zero_point is None else scales.zero_point.to(torch.float32).contiguous()
        return cls(fmt, fmt.block_size(num_columns), decode_scale(scales, fmt).contiguous(), zero_point)

    def column_blocks(self, num_columns: int, order: Tensor | None) -> Sequence[int | Tensor]:
        """Block number of each column in `order` [E, K]: [E] where experts differ."""
        if order is None:
            return [column // self.block for column in range(num_columns)]
        numbers = (order // self.block).t().contiguous()
        return [int(number) for number in numbers] if numbers.shape[1] == 1 else list(numbers)

    def blocks_first(self) -> "Grid":
        """The same laid out [G, E, N]."""
        zero_point = None if self.zero_point is None else self.zero_point.permute(2, 0, 1).contiguous()
        return Grid(self.fmt, self.block, self.scale.permute(2, 0, 1).contiguous(), zero_point)

    def snap(self, values: Tensor, block: int | Tensor) -> Tensor:
        """Nearest values [E, N] in a grid laid out blocks first, in block `block`, or `block[e]` for expert e."""
        place = block if isinstance(block, int) else (block, torch.arange(len(values), device=values.device))
        zero_point = None if self.zero_point is None else self.zero_point[place]
        return snap(values, self.fmt, self.scale[place], zero_point)


def reorder(x: Tensor, order: Tensor) -> Tensor:
    """Columns of each expert of x [E, N, K] in `order` [E, K]."""
    return x.gather(-1, order.unsqueeze(1).expand_as(x))


@dataclass(frozen=True)
class Columns:
    """One batch on its way, [E, N, K]: weights, values to round in their place, and weights less rounded values.

    `bounds` [E, N] are sums of penalty (value - rounded)^2 over columns: the output error under what was factored, as
    penalties are R_cc^2. Off them goes `share` |error|^2, the part of it that is known to be none of H's.
    """

    weights: Tensor
    values: Tensor
    errors: Tensor
    bounds: Tensor
    ratios: Tensor  # [E, K, K] of the factor, in the same order
    penalties: Tensor  # [E, K]
    share: Tensor  # [E]
    block_size: int

    def round(self, leaves: "Leaves", low: int, high: int) -> None:
        """Round the columns from `low` up to `high`, whose errors from earlier columns are made good already."""
        if high - low <= self.block_size:
            leaves.round(self, low, high)
            return
        middle = low + (-(-(high - low) // self.block_size) + 1) // 2 * self.block_size
        self.round(leaves, low, middle)
        ratios = self.ratios[:, low:middle, middle:high]
        self.values[..., middle:high].baddbmm_(self.errors[..., low:middle], ratios)
        self.round(leaves, middle, high)


class Leaves:
    """Rounds a leaf in plain torch, one column of all experts and rows at a time."""

    def __init__(self, grid: Grid, num_columns: int, order: Tensor | None) -> None:
        self._grid = grid.blocks_first()
        self._blocks = grid.column_blocks(num_columns, order)

    def round(self, work: Columns, low: int, high: int) -> None:
        """Fill in `values` and `errors` of the leaf."""
        values, weights = (x[..., low:high].permute(2, 0, 1).contiguous() for x in (work.values, work.weights))
        ratios = work.ratios[:, low:high, low:high].permute(1, 2, 0).unsqueeze(-1).contiguous()  # [row, column, E, 1]
        errors, steps = torch.empty_like(values), torch.empty_like(values)
        for column in range(high - low):
            rounded = self._grid.snap(values[column], self._blocks[low + column])
            torch.sub(values[column], rounded, out=steps[column])
            error = torch.sub(weights[column], rounded, out=errors[column])
            # product and sum apart: a fused one would round otherwise than the compiled kernel
            values[column + 1 :].add_(ratios[column, column + 1 :] * error)
        work.values[..., low:high], work.errors[..., low:high] = values.permute(1, 2, 0), errors.permute(1, 2, 0)
        penalties = work.penalties[:, low:high].t().unsqueeze(-1)
        work.bounds.add_((penalties * steps.square() - work.share.unsqueeze(-1) * errors.square()).sum(0))


class CompiledLeaves(Leaves):
    """Rounds a leaf in one call of the compiled kernel."""

    def __init__(self, grid: Grid, num_columns: int, order: Tensor | None) -> None:
        self._grid, self._spec = grid, kernel.spec_of(grid.fmt, num_columns)
        self._numbers = None if order is None else (order // grid.block).contiguous()

    def round(self, work: Columns, low: int, high: int) -> None:
        """Fill in `values` and `errors` of the leaf."""
        grid = self._grid
        torch.ops.aqtx_cpu.round_columns(
            work.values, work.weights, work.errors, work.ratios, grid.scale, grid.zero_point, self._numbers,
            work.penalties, work.share, work.bounds, self._spec, grid.fmt.element.largest, low, high,
        )  # fmt: skip


def round_columns(
    weights: Tensor, factor: Factor, grid: Grid, *, order: Tensor | None, share: Tensor, block_size: int
) -> Columns:
    """Columns done: all [E, N, K] in `order`, as the weights are; the codes nearest to `values` are GPTQ's."""
    kind = CompiledLeaves if kernel.serves(weights.device) else Leaves
    weights, num_columns = weights.contiguous(), weights.shape[-1]
    work = Columns(
        weights=weights,
        values=weights.clone(),
        errors=torch.empty_like(weights),
        bounds=weights.new_zeros(weights.shape[:2]),
        ratios=factor.ratios,
        penalties=factor.diagonal.square() * (1 + SLACK),
        share=share,
        block_size=block_size,
    )
    work.round(kind(grid, num_columns, order), 0, num_columns)
    return work
