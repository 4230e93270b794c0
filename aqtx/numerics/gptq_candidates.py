"""Candidates for the codes of a batch, and for each row the one of least error on the Hessian given.

Legend: E experts, N rows, K columns; a candidate is codes at scales, with what they leave of the weights.

`rounded` is the plain algorithm at given scales, `nearest` comes with it. `refined` descends from there. Which of
them a row takes is decided by its error on the H given, so that no row is ever worse than the plain algorithm's, nor
that than round-to-nearest; on equal errors the simpler one is taken.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from aqtx.formats.codec import Scales, choose_scales, nearest_codes
from aqtx.formats.decode import to_storage_dtype
from aqtx.formats.elements import code_to_value
from aqtx.formats.table import Format
from aqtx.numerics.cholesky import Factor
from aqtx.numerics.gptq_columns import Grid, columns_first, round_columns, rows_first
from aqtx.numerics.gptq_rows import SLACK, Differences, better_rows, row_errors
from aqtx.numerics.gptq_sweeps import Descent


@dataclass(frozen=True)
class Candidate:
    """Codes uint8 [E, N, K] at stored scales; `bound` [E, N] is at least the error on the H given, None: not known."""

    codes: Tensor
    scales: Scales
    left: Differences
    bound: Tensor | None = None


@dataclass(frozen=True)
class Problem:
    """Weights [E, N, K], what the columns are rounded with (see `Curvature`), and the target of each expert."""

    W: Tensor
    fmt: Format
    factor: Factor
    order: Tensor | None
    share: Tensor
    block_size: int
    largest: Tensor | None = None  # [E, 1, 1] that NVFP4's scales per matrix are for, where it is not W's own

    def importance(self) -> Tensor:
        """What an error in each column costs at least, once later columns have made it good: R_cc^2 [E, K]."""
        penalties = self.factor.diagonal.square()
        return penalties if self.order is None else torch.zeros_like(penalties).scatter_(1, self.order, penalties)

    def searched(self) -> Scales:
        """Scales of least error under these penalties."""
        weights = self.importance()
        largest = [None] * len(self.W) if self.largest is None else self.largest
        found = [
            choose_scales(one, self.fmt, cost, largest=most)
            for one, cost, most in zip(self.W, weights, largest, strict=True)
        ]
        parts = zip(*found, strict=True)
        return Scales(*(None if part[0] is None else torch.stack(part) for part in parts))  # type: ignore[arg-type]

    def rounded(self, scales: Scales) -> tuple[Candidate, Differences]:
        """GPTQ at given scales, and what the nearest values at them leave."""
        grid = Grid.of(scales, self.fmt, self.W.shape[-1], self.order)
        ordered = columns_first(self.W.to(torch.float32), self.order)
        work = round_columns(ordered, self.factor, grid, share=self.share, block_size=self.block_size)
        codes, bound = rows_first(work.codes, self.order), work.bounds
        ours, nearest = work.errors, work.nearest
        if self.W.dtype is not torch.float32:  # what counts is what dequantizing to the weight's own dtype gives
            ours, nearest = (ordered - to_storage_dtype(ordered - x, self.W.dtype).float() for x in (ours, nearest))
        left = Differences(ours, self.order)
        known = bound if self.W.dtype is torch.float32 else None
        return Candidate(codes, scales, left, known), Differences(nearest, self.order)


def refined(
    problem: Problem, start: Candidate, targets: Tensor, shift: Tensor, *, sweeps: int, refit: bool
) -> Candidate:
    """Descend from a candidate on `targets` [E, K, K] with `shift` [E] on the diagonal; one expert at a time."""
    W, exact = problem.W, problem.W.dtype is torch.float32
    grid = Grid.of(start.scales, problem.fmt, W.shape[-1], None)
    columns, codes, scales, bounds = [], [], [], []
    for expert, weight in enumerate(W):
        H = targets[expert].clone()
        H.diagonal().add_(shift[expert])
        weights = weight.to(torch.float32).t().contiguous()
        own = grid.of_expert(expert)
        errors = weights - _values(start.codes[expert], own, weights.shape)
        shifted, codes_now = own.shifted(weights[None])[0], start.codes[expert].t().contiguous()
        descent = Descent.of(shifted, errors, codes_now, grid=own, H=H, leaf=problem.block_size)
        descent.run(sweeps, refit=refit)
        left = descent.errors[0]
        if not exact:
            left = weights - to_storage_dtype(weights - left, W.dtype).float()
        bounds.append(descent.objective() * (1 + SLACK) - problem.share[expert] * left.square().sum(0))
        columns.append(left)
        codes.append(descent.codes[0].t().contiguous())
        scales.append(descent.grid.scales())
    parts = zip(*scales, strict=True)
    joined = Scales(*(None if part[0] is None else torch.cat(part) for part in parts))  # type: ignore[arg-type]
    bound = torch.stack(bounds) if exact else None
    return Candidate(torch.stack(codes), joined, Differences(torch.stack(columns), None), bound)


def _values(codes: Tensor, grid: Grid, shape: torch.Size) -> Tensor:
    """What codes [N, K] mean: float32 [K, N]."""

    def spread(part: Tensor) -> Tensor:
        return part[0].repeat_interleave(grid.block, 0)[: shape[0]]

    zero_point = None if grid.zero_point is None else spread(grid.zero_point)
    values = code_to_value(codes.t(), grid.fmt.element, zero_point) * spread(grid.scale)
    return values if grid.minimum is None else values - spread(grid.minimum)


@dataclass(frozen=True)
class Judge:
    """What decides between candidates: the H given [E, K, K] and the bounds from below that go with it."""

    H: Tensor
    basis: Tensor
    tight: bool

    def wins(self, one: Candidate, nearest: Differences) -> Tensor:
        """Rows [E, N] whose error is smaller than that of `nearest`, which lies in the factor's order."""
        return better_rows(one.left, nearest, self.H, basis=self.basis, bound=one.bound, tight=self.tight)


def merged(
    problem: Problem, plain: Candidate, nearest: Differences, fine: Candidate | None, judge: Judge
) -> tuple[Candidate, Tensor]:
    """Row by row the best of all, and where that is round-to-nearest [E, N]."""
    if fine is None:
        at_nearest, at_plain = ~judge.wins(plain, nearest), judge.wins(plain, nearest)
    else:
        best = judge.wins(fine, plain.left) & judge.wins(fine, nearest)
        at_nearest, at_plain = torch.zeros_like(best), torch.zeros_like(best)
        for expert, rest in enumerate(~best):
            rows = rest.nonzero().flatten()
            if len(rows):
                stack = torch.stack([x.rows(expert, rows) for x in (nearest, plain.left, fine.left)])
                choice = row_errors(stack, judge.H[expert]).argmin(0)
                at_nearest[expert, rows], at_plain[expert, rows] = choice == 0, choice == 1
    own = plain if fine is None else fine
    codes = torch.where(at_plain.unsqueeze(-1), plain.codes, own.codes)
    if at_nearest.any():
        codes[at_nearest] = nearest_codes(problem.W[at_nearest], problem.fmt, rows_of(plain.scales, at_nearest))
    return Candidate(codes, _merge(at_nearest | at_plain, plain.scales, own.scales), own.left), at_nearest


def _merge(simple: Tensor, plain: Scales, fine: Scales) -> Scales:
    """Of rows [E, N] that took the plain scales, and of the others; a matrix's own scale is the same in both."""
    scale, zero_point = plain.scale, plain.zero_point
    if zero_point is not None and fine.zero_point is not None:
        zero_point = torch.where(simple.unsqueeze(-1), zero_point, fine.zero_point)
    supers = plain.super_scale
    if supers is not None and fine.super_scale is not None:
        supers = torch.where(simple.unsqueeze(-1), supers, fine.super_scale)
    return Scales(torch.where(simple.unsqueeze(-1), scale, fine.scale), zero_point, plain.per_tensor_scale, supers)


def rows_of(scales: Scales, rows: Tensor) -> Scales:
    """Of some rows [E, N]."""
    per_tensor = scales.per_tensor_scale
    spread = None if per_tensor is None else per_tensor.expand(*rows.shape, 1)[rows]
    zero_point, supers = (None if part is None else part[rows] for part in (scales.zero_point, scales.super_scale))
    return Scales(scales.scale[rows], zero_point, spread, supers)
