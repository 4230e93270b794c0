"""Coordinate descent on the codes and scales that GPTQ leaves, until a sweep gains next to nothing.

Legend: N rows, K columns; D = W - Q [K, N], columns first and in the stored order; H [K, K] is what was factored,
damping and prior included; the objective of a row is d H d^T, and g = H D half its gradient.

GPTQ rounds each column once and never looks back. A sweep visits the columns again: with all others held, the best
value of one is the nearest to `w - (d - g / H_cc)`, and a code that changes moves g by a multiple of a column of H.
Before a block's codes its scale is visited in the same way: for values `s c` the objective is a parabola in s, whose
least value among the scales that the format can store is the one nearest to `s + c.g / (c H c)`. No step can make a row
worse, every value stays one of the format's, and a sweep takes one multiplication a weight and column.

Columns are halved recursively as in gptq_columns.py: what one half moved reaches the other's g in one matrix
product, and a leaf of a few columns is one call of the compiled kernel, or plain torch with the same bits.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from aqtx.formats import kernel, super_blocks
from aqtx.formats.elements import round_value, value_to_code
from aqtx.numerics.gptq_columns import Grid

LEAST_GAIN = 1e-3  # of the objective; a sweep that gains less is the last


@dataclass(frozen=True)
class Descent:
    """One matrix on its way, changed in place: every tensor [1, K, N] but those of H."""

    grid: Grid  # in the stored order, its scale is a copy of this descent's own
    per_tensor: Tensor | None  # of NVFP4 [1, 1, 1]
    weights: Tensor
    errors: Tensor  # D
    codes: Tensor  # uint8
    gradient: Tensor  # g
    moved: Tensor  # what the current sweep added to D so far
    H: Tensor  # [1, K, K]
    inverse: Tensor  # [1, K] of its diagonal, 0 for inputs that are always 0
    leaf: int

    @classmethod
    def of(cls, weights: Tensor, errors: Tensor, codes: Tensor, *, grid: Grid, H: Tensor, leaf: int) -> "Descent":
        """From weights [K, N], what rounding left of them, and its codes."""
        diagonal = H.diagonal()
        inverse = torch.where(diagonal > 0, 1 / diagonal, 0.0)
        minimum = None if grid.minimum is None else grid.minimum.clone()
        own = replace(grid, scale=grid.scale.clone(), minimum=minimum, blocks=None)
        D = errors.unsqueeze(0).contiguous()
        gradient = (H @ errors).unsqueeze(0)
        rest = (gradient, torch.empty_like(D), H.unsqueeze(0).contiguous(), inverse.unsqueeze(0), leaf)
        return cls(own, grid.per_tensor, weights.unsqueeze(0).contiguous(), D, codes.unsqueeze(0).contiguous(), *rest)

    def objective(self) -> Tensor:
        """d H d^T of each row [N]."""
        return torch.linalg.vecdot(self.errors[0], self.gradient[0], dim=0)

    def run(self, most: int, *, refit: bool) -> None:
        """Sweep at most so many times."""
        before = self.objective().sum()
        for _ in range(most):
            self._sweep(0, self.weights.shape[1], refit)
            after = self.objective().sum()
            if not bool(before - after >= LEAST_GAIN * before):
                break
            before = after

    def _sweep(self, low: int, high: int, refit: bool) -> None:
        """Visit scales and codes of the columns from `low` up to `high`."""
        unit = self.grid.block * max(self.leaf // self.grid.block, 1)  # whole blocks, as their scales come first
        if high - low <= unit:
            shift = self._rescale(low, high) if refit else None
            self._recode(low, high)
            if shift is not None:
                self.moved[:, low:high] += shift
            return
        middle = _middle(low, high, unit)
        self._sweep(low, middle, refit)
        self._tell(slice(low, middle), slice(middle, high))
        self._sweep(middle, high, refit)
        self._tell(slice(middle, high), slice(low, middle))

    def _tell(self, moved: slice, other: slice) -> None:
        """Bring g of other columns up to date."""
        self.gradient[:, other].baddbmm_(self.H[:, other, moved], self.moved[:, moved])

    def _recode(self, low: int, high: int) -> None:
        """Visit the codes of some columns; `moved` is then what that added to D."""
        if high - low <= self.leaf:
            (_compiled_leaf if kernel.serves(self.weights.device) else _leaf)(self, low, high)
            return
        middle = _middle(low, high, self.leaf)
        self._recode(low, middle)
        self._tell(slice(low, middle), slice(middle, high))
        self._recode(middle, high)
        self._tell(slice(middle, high), slice(low, middle))

    def _rescale(self, low: int, high: int) -> Tensor:
        """Visit the scales of the blocks in some columns; returns what that added to D."""
        own = slice(low, high)
        before = self.errors[:, own].clone()
        for start in range(low, high, self.grid.block):
            block, inside = slice(start, min(start + self.grid.block, high)), start // self.grid.block
            scale = self.grid.scale[:, inside]  # [1, N]
            codes = (self.weights[:, block] - self.errors[:, block]) / scale.unsqueeze(1)
            curved = self.H[:, own, block] @ codes  # [1, columns, N]
            c_H_c = (curved[:, start - low : block.stop - low] * codes).sum(1)
            c_g = (codes * self.gradient[:, block]).sum(1)
            found = self.grid.nearest_scale(scale + c_g / c_H_c, inside)
            step = found - scale
            better = (step * (2 * c_g - step * c_H_c) > 0) & (found * scale > 0) & found.isfinite()
            step = torch.where(better, step, 0.0).unsqueeze(1)
            scale.copy_(torch.where(better, found, scale))
            self.errors[:, block] -= step * codes
            self.gradient[:, own] -= step * curved
            if self.grid.minimum is not None:
                self._shift(self.grid.minimum[:, inside], own, block)
        return self.errors[:, own] - before

    def _shift(self, minimum: Tensor, own: slice, block: slice) -> None:
        """Visit the minimum [1, N] of a block: on it D depends with slope 1, so its best change is -1.g / (1 H 1)."""
        assert self.grid.supers is not None
        curved = self.H[:, own, block].sum(2)  # [1, columns]
        one_H_one = curved[:, block.start - own.start : block.stop - own.start].sum()
        one_g = self.gradient[:, block].sum(1)
        inside = block.start // self.grid.block
        found = super_blocks.nearest(
            minimum - one_g / one_H_one, self.grid.supers, inside, self.grid.fmt, of_minimum=True
        )
        step = found - minimum
        better = step * (2 * one_g + step * one_H_one) < 0
        step = torch.where(better, step, 0.0)
        minimum.copy_(torch.where(better, found, minimum))
        self.errors[:, block] += step.unsqueeze(1)
        self.weights[:, block] += step.unsqueeze(1)
        self.gradient[:, own] += step.unsqueeze(1) * curved.unsqueeze(2)


def _middle(low: int, high: int, step: int) -> int:
    return low + (-(-(high - low) // step) + 1) // 2 * step


def _leaf(work: Descent, low: int, high: int) -> None:
    """In plain torch, one column of all rows at a time."""
    element = work.grid.fmt.element
    for column in range(low, high):
        scale, zero_point = work.grid.at(column)
        weight, error = work.weights[:, column], work.errors[:, column]
        wanted = weight - (error - work.gradient[:, column] * work.inverse[:, column, None])
        value = round_value(wanted / scale, element, zero_point)
        work.codes[:, column] = value_to_code(value, element, zero_point)
        now = weight - value * scale
        work.moved[:, column] = now - error
        error.copy_(now)
        # product and sum apart: a fused one would round otherwise than the compiled kernel
        later = slice(column + 1, high)
        work.gradient[:, later] += work.H[:, later, column, None] * work.moved[:, column].unsqueeze(1)
    for column in range(low, high):
        earlier = slice(low, column + 1)
        work.gradient[:, earlier] += work.H[:, earlier, column, None] * work.moved[:, column].unsqueeze(1)


def _compiled_leaf(work: Descent, low: int, high: int) -> None:
    """In one call of the compiled kernel."""
    grid = work.grid
    spec = kernel.spec_of(grid.fmt, work.weights.shape[1])
    torch.ops.aqtx_cpu.sweep_columns(
        work.gradient, work.weights, work.errors, work.moved, work.codes, work.H, work.inverse, grid.scale,
        grid.zero_point, spec, grid.fmt.element.largest, low, high,
    )  # fmt: skip
