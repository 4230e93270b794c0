"""Second moments of few tokens, drawn toward a prior that holds where no token went.

An expert that saw T tokens knows its inputs in at most T directions; plain damping leaves the others
nearly free and rounding spends its error there. Adding n0 pseudo-tokens of a prior P per token prices
them. How many is estimated from H itself, as in Ledoit and Wolf's and Chen's (OAS) shrinkage to a
known target: for T Gaussian tokens of second moment S the sampling noise is
`E|H/T - S|^2 = (tr S^2 + (tr S)^2) / T`, and the best weight of P in pseudo-tokens is the noise of
one token over the distance from S to P,

    n0 = c (tr S^2 + (tr S)^2) / |S - P|^2.

A steep spectrum is learnt from few tokens and shrunk little, a flat one is shrunk until GPTQ turns
into round-to-nearest, which is best there. c = 1 is optimal for the error of S itself; rounding
punishes directions thought free, so c = 2. On a spectrum of 1/i that makes some 60 pseudo-tokens at any
count, not hundreds. tests/test_gptq_few_tokens.py holds the held-out errors to their bounds.
"""

import torch
from torch import Tensor

CAUTION = 2.0  # c
FEWEST, MOST = 16.0, 512.0  # bounds of n0; MOST grows with the tokens, where the estimate can be trusted
MOST_PER_TOKEN = 16.0


def shrink(H: Tensor, num_tokens: Tensor, prior: Tensor | None) -> tuple[Tensor, Tensor]:
    """`H + n0 P` and n0 [E] for a batch H [E, K, K] over `num_tokens` [E].

    P is `prior` ([K, K] or [E, K, K], a second moment per token), or isotropic with H's own trace.
    """
    if prior is None:
        scale = isotropic_scale(H, num_tokens)
        n0 = pseudo_tokens(H, num_tokens, scale)
        shrunk = H.clone()
        shrunk.diagonal(dim1=-2, dim2=-1).add_((n0 * scale).unsqueeze(-1))
        return shrunk, n0
    n0 = pseudo_tokens(H, num_tokens, prior)
    return torch.addcmul(H, n0[:, None, None], prior), n0


def isotropic_scale(H: Tensor, num_tokens: Tensor) -> Tensor:
    """Mean second moment per token and channel [E]."""
    return _trace(H) / (H.shape[-1] * num_tokens.clamp_min(1))


def pseudo_tokens(H: Tensor, num_tokens: Tensor, prior: Tensor) -> Tensor:
    """n0 [E] for a prior [K, K] or [E, K, K], or the isotropic one of scale [E]."""
    count = num_tokens.clamp_min(2)
    trace, square = _trace(H) / count, _inner(H, H) / count**2
    # the sample's |H/T|^2 holds the noise of (tr S)^2 / T; Gaussian correction for the rest
    true_square = (count**2 / ((count - 1) * (count + 2)) * (square - trace**2 / count)).clamp_min(0)
    true_square = torch.maximum(true_square, trace**2 / H.shape[-1])
    noise = true_square + trace**2
    if prior.dim() == 1:
        distance = true_square - 2 * prior * trace + H.shape[-1] * prior**2
    else:
        stack = prior if prior.dim() == 3 else prior.unsqueeze(0)
        distance = true_square - 2 * _inner(H, prior.expand_as(H)) / count + _inner(stack, stack)
    most = (MOST_PER_TOKEN * num_tokens).clamp_min(MOST)
    n0 = CAUTION * noise / distance.clamp_min(0)  # infinite or 0/0 where H cannot be told from P
    return torch.minimum(n0.nan_to_num(nan=MOST, posinf=torch.inf), most).clamp_min(FEWEST)


def _trace(H: Tensor) -> Tensor:
    return H.diagonal(dim1=-2, dim2=-1).sum(-1)


def _inner(left: Tensor, right: Tensor) -> Tensor:
    """Sum of products over the last two dimensions: [E]."""
    return torch.stack([torch.dot(one.flatten(), other.flatten()) for one, other in zip(left, right, strict=True)])


def pooled_prior(H: Tensor, num_tokens: Tensor) -> Tensor:
    """Second moment per token [K, K] of tokens pooled over a layer's experts, itself shrunk toward isotropic."""
    shrunk, n0 = shrink(H.unsqueeze(0), num_tokens.reshape(1), None)
    return shrunk[0] / (num_tokens + n0)
