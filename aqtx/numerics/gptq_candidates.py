"""Candidates for the codes of a batch, and for each row the one of least error on the Hessian given.

Legend: E experts, N rows, K columns; a candidate is codes at scales, with what they leave of the weights.

`rounded` is the plain algorithm at given scales, `nearest` rounds to nearest there. `refined` descends from a
candidate. Which of them a row takes is decided by its error on the H given, so that no row is ever worse than the
plain algorithm's, nor than round-to-nearest; on equal errors the simpler one is taken.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from aqtx.formats.codec import Scales, choose_scales, nearest_codes, nearest_values
from aqtx.formats.decode import to_storage_dtype
from aqtx.formats.table import Format
from aqtx.numerics.cholesky import Factor
from aqtx.numerics.gptq_columns import Grid, columns_first, round_columns, rows_first
from aqtx.numerics.gptq_rows import Contest, Left
from aqtx.numerics.gptq_sweeps import Descent, RowGrid


@dataclass(frozen=True)
class Candidate:
    """Codes uint8 [E, N, K] at stored scales, and d T d^T [E, N] of the float32 values that they mean."""

    codes: Tensor
    scales: Scales
    objective: Tensor


@dataclass(frozen=True)
class Judge:
    """What decides between candidates: the H given [E, K, K], and the bounds that go with it.

    basis: [E, m, K] of the bound from below; share: [E], how much of the identity T has beyond H, where `tight`
    nothing but that.
    """

    H: Tensor
    basis: Tensor
    share: Tensor
    tight: bool


@dataclass(frozen=True)
class Problem:
    """Weights [E, N, K] and what their columns are rounded with (see `Curvature`)."""

    W: Tensor
    fmt: Format
    factor: Factor
    order: Tensor | None
    block_size: int
    largest: Tensor | None = None  # [E, 1, 1] that NVFP4's scales per matrix are for, where it is not W's own

    @cached_property
    def rows(self) -> Tensor:
        """The weights in float32."""
        return self.W.to(torch.float32).contiguous()

    @cached_property
    def columns(self) -> Tensor:
        """The weights columns first, in the factor's order: float32 [E, K, N]."""
        return columns_first(self.rows, self.order)

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

    def rounded(self, scales: Scales) -> Candidate:
        """GPTQ at given scales."""
        grid = Grid.of(scales, self.fmt, self.W.shape[-1], self.order)
        work = round_columns(self.columns, self.factor, grid, block_size=self.block_size)
        return Candidate(rows_first(work.codes, self.order), scales, work.objective)

    def left_by(self, candidate: Candidate) -> Tensor:
        """What a candidate leaves of the weights once it is stored in their dtype: float32 [E, N, K]."""
        grid = RowGrid.of(candidate.scales, self.fmt, self.W.shape[-1])
        return self.as_stored(grid.left_by(grid.shifted(self.rows), candidate.codes)[0])

    def left_by_nearest(self, scales: Scales) -> Tensor:
        """The same of the nearest codes at given scales."""
        if self.W.dtype is torch.float32:
            grid = RowGrid.of(scales, self.fmt, self.W.shape[-1])
            return grid.left_by(grid.shifted(self.rows), None)[0]
        return self.rows - nearest_values(self.W, self.fmt, scales).float()

    def as_stored(self, left: Tensor) -> Tensor:
        """What is left when the values are stored in the weights' dtype."""
        if self.W.dtype is torch.float32:
            return left
        return self.rows - to_storage_dtype(self.rows - left, self.W.dtype).float()

    def refined(self, start: Candidate, targets: Tensor, *, sweeps: int, refit: bool) -> tuple[Candidate, Tensor]:
        """Descend from a candidate on `targets` [E, K, K], damped; one expert at a time. Also what it leaves."""
        grid = RowGrid.of(start.scales, self.fmt, self.W.shape[-1])
        left, codes, objectives, scales = torch.empty_like(self.rows), [], [], []
        for expert, H in enumerate(targets):
            own = slice(expert, expert + 1)
            descent = Descent.of(self.rows[own], start.codes[own], grid=grid.of_expert(expert), H=H.unsqueeze(0))
            objectives.append(descent.run(sweeps, refit=refit))
            codes.append(descent.codes)
            scales.append(descent.grid.scales())
            left[own] = descent.errors
        parts = zip(*scales, strict=True)
        joined = Scales(*(None if part[0] is None else torch.cat(part) for part in parts))  # type: ignore[arg-type]
        return Candidate(torch.cat(codes), joined, torch.cat(objectives)), self.as_stored(left)


@dataclass(frozen=True)
class Choice:
    """Codes and scales of every row's best candidate, where that is round-to-nearest [E, N], and what each leaves."""

    codes: Tensor
    scales: Scales
    at_nearest: Tensor
    left: tuple[Tensor, ...]  # nearest, plain, and refined if there is one


def choose(problem: Problem, plain: Candidate, fine: tuple[Candidate, Tensor] | None, judge: Judge) -> Choice:
    """Row by row the best of round-to-nearest, the plain algorithm and what was refined."""
    known = problem.W.dtype is torch.float32
    candidates = [(None, problem.left_by_nearest(plain.scales)), (plain.objective, problem.left_by(plain))]
    if fine is not None:
        candidates.append((fine[0].objective, fine[1]))
    best = []
    for expert, H in enumerate(judge.H):
        mine = [Left(left[expert], one[expert] if known and one is not None else None) for one, left in candidates]
        share = float(judge.share[expert]) if judge.tight else None
        best.append(Contest(mine, H, basis=judge.basis[expert], share=share).best())
    choice = torch.stack(best)
    at_nearest, simple = choice == 0, choice < 2
    own = plain if fine is None else fine[0]
    codes, scales = own.codes, own.scales
    if own is not plain and bool(simple.any()):
        codes[simple] = plain.codes[simple]
        scales = _merge(simple, plain.scales, scales)
    if bool(at_nearest.any()):
        codes[at_nearest] = nearest_codes(problem.W[at_nearest], problem.fmt, rows_of(plain.scales, at_nearest))
    return Choice(codes, scales, at_nearest, tuple(left for _, left in candidates))


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
