"""Scales refitted and codes swept after GPTQ's columns, until a sweep gains next to nothing.

Legend: E experts, N rows, K columns, B of a block; D = W - Q [N, K] in the stored order; H [K, K] is what was factored,
damping and prior included; the objective of a row is d H d^T, and g = D H half its gradient.

GPTQ rounds each column once and never looks back. A sweep visits every code of a row again: with all others held, the
best value is the nearest to `w - (d - g / H_cc)`. Few codes move, one in twenty in the first sweep, so that for each
that does a row of H is added to g, which takes less than multiplying by H. A row whose sweep gains less than 0.1 % of
its objective is done.

Before the sweeps each block's scale is visited once: for values `s c` the objective is a parabola in s, whose least
value among the scales that the format can store is the one nearest to `s + c.g / (c H c)`. Powers of two stay as they
are, since none moves by that. No step makes a row worse, and every value stays one of the format's.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from aqtx.formats import kernel, super_blocks
from aqtx.formats.codec import Scales
from aqtx.formats.elements import code_to_value, round_value, value_to_code
from aqtx.formats.scale_rules import nearest_scale, stored_scale
from aqtx.formats.scales import Affine, decode_affine
from aqtx.formats.table import E8M0, Format
from aqtx.numerics.products import add_product, product

LEAST_GAIN = 1e-3  # of a row's objective; a sweep that gains less is its last
PANEL = 128  # columns whose gradient is found together when scales are refitted


@dataclass(frozen=True)
class RowGrid:
    """The values that weights [E, N, K] may take: scale, zero point and what values are less by, [E, N, G], decoded."""

    fmt: Format
    num_columns: int
    scale: Tensor
    zero_point: Tensor | None
    minimum: Tensor | None
    per_tensor: Tensor | None  # of NVFP4 [E, 1, 1], already in `scale`
    supers: Tensor | None  # of K-quants [E, N, S], already in `scale` and `minimum`

    @classmethod
    def of(cls, scales: Scales, fmt: Format, num_columns: int) -> "RowGrid":
        """From stored scales [E, N, G]."""
        affine = decode_affine(scales, fmt)
        scale, zero_point, minimum = (None if part is None else part.float().contiguous() for part in affine)
        assert scale is not None
        return cls(fmt, num_columns, scale, zero_point, minimum, scales.per_tensor_scale, scales.super_scale)

    @property
    def block(self) -> int:
        """B."""
        return self.fmt.block_size(self.num_columns)

    def scales(self) -> Scales:
        """As they are stored."""
        if self.supers is not None:
            return super_blocks.coded(Affine(self.scale, None, self.minimum), self.supers, self.fmt)
        zero_point = None if self.zero_point is None else self.zero_point.to(torch.uint8)
        return Scales(stored_scale(self.scale, self.fmt, self.per_tensor), zero_point, self.per_tensor)

    def of_expert(self, expert: int) -> "RowGrid":
        """That of one matrix, its scale and minimum copies."""
        parts = (self.scale, self.zero_point, self.minimum, self.per_tensor, self.supers)
        scale, zero_point, minimum, *rest = (None if part is None else part[expert : expert + 1] for part in parts)
        assert scale is not None
        own = None if minimum is None else minimum.clone()
        return RowGrid(self.fmt, self.num_columns, scale.clone(), zero_point, own, *rest)

    def shifted(self, weights: Tensor) -> Tensor:
        """Weights [E, N, K] plus the minimum of their blocks: on that the values are multiples of the scale."""
        return weights if self.minimum is None else weights + self._of_columns(self.minimum)

    def nearest_scale(self, wanted: Tensor, block: int) -> Tensor:
        """The scale [E, N] of one block that can be stored nearest to `wanted`."""
        if self.supers is not None:
            return super_blocks.nearest(wanted, self.supers, block, self.fmt)
        return nearest_scale(wanted, self.fmt, self.per_tensor)

    def left_by(self, weights: Tensor, codes: Tensor | None) -> tuple[Tensor, Tensor]:
        """What codes (None: the nearest ones) leave of shifted weights [E, N, K], and what they mean unscaled."""
        if kernel.serves(weights.device):
            spec, largest = kernel.spec_of(self.fmt, self.num_columns), self.fmt.element.largest
            return torch.ops.aqtx_cpu.left_by(weights, codes, self.scale, self.zero_point, spec, largest)
        scale, zero = self.spread()
        element = self.fmt.element
        steps = round_value(weights / scale, element, zero) if codes is None else code_to_value(codes, element, zero)
        return weights - steps * scale, steps

    def spread(self) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point of each weight."""
        return self._of_columns(self.scale), None if self.zero_point is None else self._of_columns(self.zero_point)

    def _of_columns(self, part: Tensor) -> Tensor:
        return part.repeat_interleave(self.block, -1)[..., : self.num_columns]


@dataclass(frozen=True)
class Descent:
    """One matrix on its way, changed in place: every tensor [1, N, K] but those of H and the objective [1, N]."""

    grid: RowGrid
    weights: Tensor  # shifted
    errors: Tensor  # D
    codes: Tensor  # uint8
    steps: Tensor  # what the codes meant at the start, before the scale
    H: Tensor  # [1, K, K]

    @classmethod
    def of(cls, weights: Tensor, codes: Tensor, *, grid: RowGrid, H: Tensor) -> "Descent":
        """From weights [1, N, K] and codes of them."""
        shifted = grid.shifted(weights)
        errors, steps = grid.left_by(shifted, codes)
        return cls(grid, shifted, errors, codes.clone(), steps, H)

    def run(self, most: int, *, refit: bool) -> Tensor:
        """Refit scales if asked to, sweep at most so many times; returns the objective of each row [1, N]."""
        refits = refit and self.grid.fmt.scale is not E8M0
        gradient = self._refit() if refits else product(self.errors[0], self.H[0])
        objective = torch.linalg.vecdot(self.errors[0], gradient).unsqueeze(0)
        if most:
            descend = _compiled_descent if kernel.serves(self.weights.device) else _descent
            descend(self, gradient.unsqueeze(0), objective, most)
        return objective

    def _refit(self) -> Tensor:
        """Visit every scale once; returns g [N, K]."""
        block, K, H = self.grid.block, self.grid.num_columns, self.H[0]
        width = block * max(PANEL // block, 1)
        gradient, moved = torch.empty_like(self.errors[0]), torch.empty_like(self.errors[0])
        for low in range(0, K, width):
            own = slice(low, min(low + width, K))
            before, found = self.errors[0, :, own].clone(), product(self.errors[0], H[:, own])
            for start in range(own.start, own.stop, block):
                self._rescale(slice(start, min(start + block, K)), found, own)
            gradient[:, own] = found
            torch.sub(self.errors[0, :, own], before, out=moved[:, own])
        for low in range(0, K - width, width):  # what later blocks did to earlier ones
            own, later = slice(low, low + width), slice(low + width, K)
            add_product(gradient[:, own], moved[:, later], H[later, own])
        return gradient

    def _rescale(self, block: slice, gradient: Tensor, panel: slice) -> None:
        """Visit the scale of one block; `gradient` is that of the panel's columns."""
        inside = slice(block.start - panel.start, block.stop - panel.start)
        place = block.start // self.grid.block
        scale, codes = self.grid.scale[0, :, place], self.steps[0, :, block]
        curved = product(codes, self.H[0, block, panel])
        c_H_c = torch.linalg.vecdot(curved[:, inside], codes)
        c_g = torch.linalg.vecdot(gradient[:, inside], codes)
        found = self.grid.nearest_scale((scale + c_g / c_H_c).unsqueeze(0), place)[0]
        step = found - scale
        better = (step * (2 * c_g - step * c_H_c) > 0) & (found * scale > 0) & found.isfinite()
        scale.copy_(torch.where(better, found, scale))
        gradient.addcmul_(curved, torch.where(better, step, 0.0).unsqueeze(1), value=-1)
        if self.grid.minimum is not None:
            self._shift(self.grid.minimum[0, :, place], block, gradient, panel)
        torch.sub(self.weights[0, :, block], codes * scale.unsqueeze(1), out=self.errors[0, :, block])

    def _shift(self, minimum: Tensor, block: slice, gradient: Tensor, panel: slice) -> None:
        """Visit the minimum [N] of a block: on it D depends with slope 1, so its best change is -1.g / (1 H 1)."""
        assert self.grid.supers is not None
        inside = slice(block.start - panel.start, block.stop - panel.start)
        curved = self.H[0, block, panel].sum(0)
        one_H_one, one_g = curved[inside].sum(), gradient[:, inside].sum(1)
        wanted, place = (minimum - one_g / one_H_one).unsqueeze(0), block.start // self.grid.block
        [found] = super_blocks.nearest(wanted, self.grid.supers, place, self.grid.fmt, of_minimum=True)
        step = found - minimum
        better = step * (2 * one_g + step * one_H_one) < 0
        step = torch.where(better, step, 0.0).unsqueeze(1)
        minimum.copy_(torch.where(better, found, minimum))
        self.weights[0, :, block] += step
        gradient += step * curved

    @property
    def inverse(self) -> Tensor:
        """[1, K] of H's diagonal, 0 for inputs that are always 0."""
        diagonal = self.H.diagonal(dim1=-2, dim2=-1)
        return torch.where(diagonal > 0, 1 / diagonal, 0.0)


def _descent(work: Descent, gradient: Tensor, objective: Tensor, most: int) -> None:
    """In plain torch, one column of all rows at a time."""
    element, (scale, zero), inverse = work.grid.fmt.element, work.grid.spread(), work.inverse
    weights, errors, codes, g, H = work.weights[0], work.errors[0], work.codes[0], gradient[0], work.H[0]
    active = torch.ones(len(weights), dtype=torch.bool, device=weights.device)
    for _ in range(most):
        added = torch.zeros_like(objective[0])
        for c in range(weights.shape[1]):
            own = None if zero is None else zero[0, :, c]
            wanted = (weights[:, c] - (errors[:, c] - g[:, c] * inverse[0, c])) / scale[0, :, c]
            value = round_value(wanted, element, own)
            now = weights[:, c] - value * scale[0, :, c]
            step = now - errors[:, c]
            rows = ((step != 0) & active).nonzero().flatten()
            step = step[rows]
            # products and sums apart: fused ones would round otherwise than the compiled kernel
            added[rows] += step * (2 * g[rows, c] + step * H[c, c])
            errors[rows, c] = now[rows]
            codes[rows, c] = value_to_code(value[rows], element, None if own is None else own[rows])
            g[rows] += step.unsqueeze(1) * H[c]
        before = objective[0].clone()
        objective[0] += added
        active &= -added >= LEAST_GAIN * before
        if not bool(active.any()):
            break


def _compiled_descent(work: Descent, gradient: Tensor, objective: Tensor, most: int) -> None:
    """In one call of the compiled kernel."""
    grid = work.grid
    spec = kernel.spec_of(grid.fmt, grid.num_columns)
    torch.ops.aqtx_cpu.descend(
        gradient, work.weights, work.errors, work.codes, work.H, work.inverse, grid.scale, grid.zero_point, objective,
        spec, grid.fmt.element.largest, most, LEAST_GAIN,
    )  # fmt: skip
