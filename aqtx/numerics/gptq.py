"""GPTQ (arXiv 2210.17323) for a batch of experts, in any format of the table.

Legend: E experts, N rows (outputs), K columns (inputs); H [K, K] is the plain sum of x x^T over tokens.

Scales are fixed before any column is rounded, so that the output holds values of the declared format only and act-order
costs nothing at run time. The plain algorithm takes those of `quantize(W)`. Beyond it, `search_scales` takes for each
block the scale of least error under the penalties of GPTQ's own factor, and `sweeps` of coordinate descent over codes
and, with `refit_scales`, scales follow the columns (gptq_sweeps.py).

Each row keeps the best of that, plain GPTQ and round-to-nearest on the H given, so no row is ever worse there.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from aqtx.errors import InputError
from aqtx.formats.codec import Scales, all_finite, check_finite, choose_scales, packed, quantize
from aqtx.formats.table import Format, parse
from aqtx.formats.tensor import QuantizedTensor
from aqtx.numerics.cholesky import Factor, factor
from aqtx.numerics.gptq_candidates import Candidate, Judge, Problem, choose
from aqtx.numerics.gptq_rows import bound_basis, row_errors
from aqtx.numerics.shrinkage import isotropic_scale, shrink
from aqtx.numerics.units import scales_times, unit_of_moments, unit_of_weights

Order = Literal["none", "activation"]
ORDERS: tuple[Order, ...] = ("none", "activation")
SAMPLES = 32  # rows that stand for all in the errors that are reported


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to solve. `block_size` columns are rounded one at a time before errors travel on in a batch.

    Without `search_scales` and with 0 `sweeps` it is plain GPTQ.
    """

    damp_fraction: float = 0.01
    order: Order = "none"
    block_size: int = 32
    search_scales: bool = True
    refit_scales: bool = True
    sweeps: int = 4


@dataclass(frozen=True)
class Solution:
    """Codes of a batch, and what it took, all [E].

    Errors are sums of d H d^T over rows, on the H given, estimated from 32 to 63 rows at equal distances
    (from all where there are fewer).
    """

    tensor: QuantizedTensor
    damping: Tensor
    pseudo_tokens: Tensor
    nearest_error: Tensor
    error: Tensor
    power: Tensor  # w H w^T, to put the errors in relation
    rows_nearest: Tensor  # rows that kept round-to-nearest

    def in_units_of(self, unit: Tensor, scales: Scales) -> "Solution":
        """What was found for weights times `unit` [E] as what it is for the weights, `scales` theirs."""
        old = self.tensor
        tensor = QuantizedTensor(old.qdata, old.format_name, old.num_columns, old.dtype, *scales)
        squares = unit.double().square()
        errors = {name: getattr(self, name) / squares for name in ("nearest_error", "error", "power")}
        return replace(self, tensor=tensor, **errors)


def gptq(  # noqa: PLR0913  (a promised interface)
    W: Tensor,
    H: Tensor,
    format_name: str | Format,
    *,
    damp_fraction: float = 0.01,
    order: Order = "none",
    num_tokens: int | Tensor | None = None,
    prior: Tensor | None = None,
) -> QuantizedTensor:
    """Round W [N, K] or [E, N, K] to a format so that the output error on H ([K, K] or [E, K, K]) is small.

    Args:
        W: weights in any floating dtype.
        H: plain sum of x x^T over the tokens, symmetric and positive semi-definite.
        format_name: any format of the table.
        damp_fraction: of the mean diagonal, added to the diagonal; raised tenfold where factoring fails.
        order: "activation" rounds the columns of largest H first.
        num_tokens: tokens that H sums over, [E] for a batch or one number for all; None switches shrinkage off.
        prior: second moment per token to shrink to, positive semi-definite; None takes H's own trace, evenly spread.

    Raises:
        InputError: shapes do not agree, a value is not finite, or H is not positive semi-definite.
    """
    single = W.dim() == 2
    options = Options(damp_fraction=damp_fraction, order=order)
    batch_W, batch_H = (W[None].detach(), H[None].detach()) if single else (W.detach(), H.detach())
    tokens = None if num_tokens is None else torch.as_tensor(num_tokens, dtype=torch.float32, device=W.device)
    tokens = tokens.expand(len(batch_W)) if tokens is not None and tokens.dim() == 0 else tokens
    tensor = solve(batch_W, batch_H, parse(format_name), num_tokens=tokens, prior=prior, options=options).tensor
    return tensor[0] if single else tensor


def solve(
    W: Tensor,
    H: Tensor,
    fmt: Format,
    *,
    num_tokens: Tensor | None = None,
    prior: Tensor | None = None,
    options: Options = Options(),
) -> Solution:
    """`gptq` of a batch W [E, N, K], H [E, K, K], with all that the report wants to know."""
    check_weights(W, H)
    return Curvature.of(H, num_tokens=num_tokens, prior=prior, options=options).solve(W, fmt)


@dataclass(frozen=True)
class Curvature:
    """What depends on the inputs only, for all matrices that read them: H, and the factor of what is solved."""

    factor: Factor
    order: Tensor | None  # [E, K], None for the stored order
    pseudo_tokens: Tensor
    judge: Judge
    target: Tensor | None  # what is factored [E, K, K], for sweeps
    options: Options
    unit: Tensor  # [E] power of two that H is multiplied by in here

    @classmethod
    def of(cls, H: Tensor, *, num_tokens: Tensor | None, prior: Tensor | None, options: Options) -> "Curvature":
        """Shrink, order, damp and factor a batch H [E, K, K]."""
        _check(H, num_tokens, prior, options)
        unit = unit_of_moments(H, prior)
        if bool((unit != 1).any()):
            H = H * unit[:, None, None].to(H.dtype)
            prior = None if prior is None else prior * (unit[:, None, None] if prior.dim() == 3 else unit[0]).to(prior)
        H = H.to(torch.float32)
        num_tokens, prior = (None if x is None else x.to(H) for x in (num_tokens, prior))
        target, n0 = (H, H.new_zeros(len(H))) if num_tokens is None else shrink(H, num_tokens, prior)
        tight = num_tokens is None or prior is None
        share = n0 * isotropic_scale(H, num_tokens) if num_tokens is not None and tight else torch.zeros_like(n0)
        order = None
        if options.order == "activation":
            order = target.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True, stable=True)
        found = factor(target, options.damp_fraction, order)
        damped = None
        if options.sweeps:
            damped = target.clone() if target is H else target
            damped.diagonal(dim1=-2, dim2=-1).add_(found.shift.unsqueeze(-1))
        return cls(found, order, n0, Judge(H, bound_basis(H), share + found.shift, tight), damped, options, unit)

    def take(self, places: list[int]) -> "Curvature":
        """Some entries of the batch."""
        found, judge = self.factor, self.judge
        factor = Factor(found.ratios[places], found.diagonal[places], found.damping[places], found.shift[places])
        order, target = (None if x is None else x[places] for x in (self.order, self.target))
        own = Judge(judge.H[places], judge.basis[places], judge.share[places], judge.tight)
        rest = (own, target, self.options, self.unit[places])
        return Curvature(factor, order, self.pseudo_tokens[places], *rest)

    def solve(self, W: Tensor, fmt: Format, *, largest: Tensor | None = None) -> Solution:
        """Codes for W [E, N, K]; `largest` [E, 1, 1] is what NVFP4's scales per matrix are for, default W's own."""
        if not fmt.is_packed:
            zeros = self.judge.H.new_zeros(len(W))
            return Solution(quantize(W, fmt), zeros, zeros, zeros, zeros, zeros, zeros + W.shape[1])
        largest = None if largest is None else largest.to(W.device)
        unit = unit_of_weights(W)
        if bool((unit != 1).any()):
            most = None if largest is None else largest * unit
            found = self._solve((W * unit).to(W.dtype), fmt, most)
            scales = scales_times(found.tensor.scales, 1 / unit, fmt)
            if scales is not None:
                return found.in_units_of(unit.flatten(), scales)
        return self._solve(W, fmt, largest)

    def _solve(self, W: Tensor, fmt: Format, largest: Tensor | None) -> Solution:
        """In units in which squares fit into float32."""
        problem = Problem(W, fmt, self.factor, self.order, self.options.block_size, largest)
        plain = problem.rounded(choose_scales(W, fmt, largest=largest))
        found = choose(problem, plain, self._refined(problem, plain), self.judge)
        power, before, *after = self._sampled(problem.rows, *found.left)
        whole = W.shape[1] / before.shape[1] / self.unit.double()
        return Solution(
            tensor=packed(found.codes, fmt, found.scales, W.dtype),
            damping=self.factor.damping,
            pseudo_tokens=self.pseudo_tokens,
            nearest_error=before.sum(-1) * whole,
            error=torch.stack([before, *after]).amin(0).sum(-1) * whole,
            power=power.sum(-1) * whole,
            rows_nearest=found.at_nearest.sum(-1),
        )

    def _refined(self, problem: Problem, plain: Candidate) -> tuple[Candidate, Tensor] | None:
        """What the options ask for beyond the plain algorithm, and what it leaves of the weights."""
        options = self.options
        start = problem.rounded(problem.searched()) if options.search_scales else plain
        if self.target is not None:
            return problem.refined(start, self.target, sweeps=options.sweeps, refit=options.refit_scales)
        return (start, problem.left_by(start)) if options.search_scales else None

    def _sampled(self, *differences: Tensor) -> tuple[Tensor, ...]:
        """d H d^T [E, n] of some rows of each [E, N, K]."""
        rows = slice(None, None, max(differences[0].shape[1] // SAMPLES, 1))
        return row_errors(torch.cat([D[:, rows] for D in differences], 1), self.judge.H).chunk(len(differences), 1)


def check_weights(W: Tensor, H: Tensor) -> None:
    """InputError unless W [E, N, K] is finite and goes with H [E, K, K]."""
    if not W.numel():
        raise InputError(f"W {list(W.shape)} holds no weights")
    if W.dim() != 3 or not W.is_floating_point():
        raise InputError(f"W must be floats [N, K] or [E, N, K], not {W.dtype} {list(W.shape)}")
    if tuple(H.shape) != (len(W), W.shape[2], W.shape[2]):
        wanted = [len(W), W.shape[2], W.shape[2]]
        raise InputError(f"H of W {list(W.shape)} must be {wanted}, not {list(H.shape)}")
    check_finite(W, "W")


def _check(H: Tensor, num_tokens: Tensor | None, prior: Tensor | None, options: Options) -> None:
    """InputError with everything that is wrong with the arguments."""
    problems = []
    if prior is not None and tuple(prior.shape[-2:]) != tuple(H.shape[-2:]):
        problems.append(f"prior must be {list(H.shape[-2:])}, not {list(prior.shape)}")
    if num_tokens is not None and tuple(num_tokens.shape) != (len(H),):
        problems.append(f"num_tokens must be [{len(H)}], not {list(num_tokens.shape)}")
    if num_tokens is not None and not bool(((num_tokens >= 0) & num_tokens.isfinite()).all()):
        problems.append(f"num_tokens must be counts, not {num_tokens.tolist()}")
    if not all_finite(H):
        problems.append("H holds NaN or infinite values")
    elif bool((H.diagonal(dim1=-2, dim2=-1) < 0).any()):
        problems.append("H is not positive semi-definite: it has a negative value on its diagonal")
    if prior is not None and not all_finite(prior):
        problems.append("prior holds NaN or infinite values")
    elif prior is not None and prior.dim() > 1 and bool((prior.diagonal(dim1=-2, dim2=-1) < 0).any()):
        problems.append("prior is not positive semi-definite: it has a negative value on its diagonal")
    if options.order not in ORDERS:
        problems.append(f"order must be one of {', '.join(ORDERS)}, not {options.order!r}")
    if options.sweeps < 0:
        problems.append(f"sweeps must not be negative, it is {options.sweeps}")
    if not 0 <= options.damp_fraction < math.inf:
        problems.append(f"damp_fraction must be a number of at least 0, it is {options.damp_fraction}")
    if problems:
        raise InputError(*problems)
