"""GPTQ's rounding of columns in order, each error made good by the columns that follow.

Legend: E experts solved as one batch, N rows, K columns, G blocks under one scale each.
Everything lies columns first, [E, K, N], in the order in which columns are rounded, so that each step is arithmetic on
runs of rows. Columns are halved recursively: the right half receives the left half's errors in one matrix product
before it starts, and only within a leaf of a few columns are errors passed on one column at a time. A
leaf is one call of the compiled kernel, or two dozen elementwise calls per column on all experts and
rows at once; both give the same bits. The result is the plain algorithm's up to the order of additions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from aqtx.formats import kernel
from aqtx.formats.codec import Scales
from aqtx.formats.elements import round_value, value_to_code
from aqtx.formats.scales import decode_affine
from aqtx.formats.table import Format
from aqtx.numerics.cholesky import Factor
from aqtx.numerics.products import add_product


def columns_first(x: Tensor, order: Tensor | None) -> Tensor:
    """x [E, N, K] as [E, K, N], the columns of each expert in `order` [E, K]."""
    out = x.new_empty(x.mT.shape)
    for expert, to in enumerate(out):
        if order is None:
            to.copy_(x[expert].t())
        else:
            torch.index_select(x[expert].t().contiguous(), 0, order[expert], out=to)
    return out


def rows_first(x: Tensor, order: Tensor | None) -> Tensor:
    """The way back: x [E, K, N] in `order` as [E, N, K] in the stored order."""
    out = x.new_empty(x.mT.shape)
    for expert, to in enumerate(out):
        to.copy_((x[expert] if order is None else x[expert][order[expert].argsort()]).t())
    return out


@dataclass(frozen=True)
class Grid:
    """The values that each weight may take, fixed before any rounding: scale and zero point [E, G, N]."""

    fmt: Format
    scale: Tensor
    zero_point: Tensor | None
    block: int
    blocks: Tensor | None  # [E, K] block of each column where they are not in the stored order
    minimum: Tensor | None = None  # [E, G, N], which values are less by

    @classmethod
    def of(cls, scales: Scales, fmt: Format, num_columns: int, order: Tensor | None) -> "Grid":
        """From the stored scales of a [E, N, K] weight."""
        affine = decode_affine(scales, fmt)
        scale, zero_point, minimum = (None if part is None else part.float().mT.contiguous() for part in affine)
        assert scale is not None
        block = fmt.block_size(num_columns)
        blocks = None if order is None else (order // block).contiguous()
        return cls(fmt, scale, zero_point, block, blocks, minimum)

    def shifted(self, columns: Tensor) -> Tensor:
        """Weights [E, K, N] plus the minimum of their blocks: on that the values are multiples of the scale."""
        if self.minimum is None:
            return columns
        if self.blocks is None:
            return columns + self.minimum.repeat_interleave(self.block, 1)[:, : columns.shape[1]]
        return columns + torch.stack([one[places] for one, places in zip(self.minimum, self.blocks, strict=True)])

    def at(self, column: int) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point [E, N] of the weights of one column."""
        place: tuple[slice | Tensor, int | Tensor] = (slice(None), column // self.block)
        if self.blocks is not None:
            place = (torch.arange(len(self.blocks), device=self.blocks.device), self.blocks[:, column])
        return self.scale[place], None if self.zero_point is None else self.zero_point[place]


@dataclass(frozen=True)
class Columns:
    """One batch on its way, [E, K, N]: weights, those with errors made good, and what rounding leaves of the weights.

    `objective` [E, N] is the sum of penalty (value - rounded)^2 over columns: the output error under what was
    factored, as penalties are R_cc^2.
    """

    weights: Tensor
    values: Tensor
    errors: Tensor  # of the columns that are done
    codes: Tensor  # uint8
    objective: Tensor
    ratios: Tensor  # [E, K, K] of the factor, in the same order
    penalties: Tensor  # [E, K]
    block_size: int

    def round(self, grid: Grid, low: int, high: int) -> None:
        """Round the columns from `low` up to `high`, whose errors from earlier columns are made good already."""
        if high - low <= self.block_size:
            (_compiled_leaf if kernel.serves(self.weights.device) else _leaf)(self, grid, low, high)
            return
        middle = low + (-(-(high - low) // self.block_size) + 1) // 2 * self.block_size
        self.round(grid, low, middle)
        for values, ratios, errors in zip(self.values, self.ratios, self.errors, strict=True):
            add_product(values[middle:high], ratios[low:middle, middle:high].t(), errors[low:middle])
        self.round(grid, middle, high)


def _leaf(work: Columns, grid: Grid, low: int, high: int) -> None:
    """In plain torch, one column of all experts and rows at a time."""
    element, objective = grid.fmt.element, torch.zeros_like(work.objective)
    for column in range(low, high):
        scale, zero_point = grid.at(column)
        value, weight = work.values[:, column], work.weights[:, column]
        snapped = round_value(value / scale, element, zero_point)
        work.codes[:, column] = value_to_code(snapped, element, zero_point)
        rounded = snapped * scale
        step, error = value - rounded, torch.sub(weight, rounded, out=work.errors[:, column])
        objective += work.penalties[:, column, None] * step.square()
        # product and sum apart: a fused one would round otherwise than the compiled kernel
        work.values[:, column + 1 : high] += work.ratios[:, column, column + 1 : high, None] * error.unsqueeze(1)
    work.objective.add_(objective)


def _compiled_leaf(work: Columns, grid: Grid, low: int, high: int) -> None:
    """In one call of the compiled kernel."""
    spec = kernel.spec_of(grid.fmt, work.weights.shape[1])
    torch.ops.aqtx_cpu.round_columns(
        work.values, work.weights, work.errors, work.codes, work.ratios, grid.scale, grid.zero_point,
        grid.blocks, work.penalties, work.objective, spec, grid.fmt.element.largest, low, high,
    )  # fmt: skip


def round_columns(weights: Tensor, factor: Factor, grid: Grid, *, block_size: int) -> Columns:
    """Columns done, for weights [E, K, N] in the order of the factor and the grid."""
    shifted = grid.shifted(weights)
    work = Columns(
        weights=shifted,
        values=shifted.clone(),
        errors=torch.empty_like(weights),
        codes=torch.empty_like(weights, dtype=torch.uint8),
        objective=weights.new_zeros(weights.shape[0], weights.shape[2]),
        ratios=factor.ratios,
        penalties=factor.diagonal.square(),
        block_size=block_size,
    )
    work.round(grid, 0, weights.shape[1])
    return work
