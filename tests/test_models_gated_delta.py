"""The gated delta rule: chunks against the recurrence token by token in float64, states carried over, gradients."""

import pytest
import torch
from torch import Tensor

from aqtx.models.gated_delta import CHUNK, gated_delta_rule

BATCH, HEADS, KEY, VALUE = 2, 3, 5, 4


def inputs(length: int, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(BATCH, length, HEADS, KEY, generator=generator) for _ in range(2))
    v = torch.randn(BATCH, length, HEADS, VALUE, generator=generator)
    decay = -torch.rand(BATCH, length, HEADS, generator=generator)
    beta = torch.rand(BATCH, length, HEADS, generator=generator)
    return q, k / k.norm(dim=-1, keepdim=True), v, decay, beta


def by_token(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The recurrence of arXiv 2412.06464, equation 10, written down in float64."""
    q, k, v, decay, beta = (part.double() for part in (q, k, v, decay, beta))
    S = q.new_zeros(BATCH, HEADS, KEY, VALUE) if state is None else state.double()
    outputs = []
    for t in range(q.shape[1]):
        S = S * decay[:, t, :, None, None].exp()
        read = torch.einsum("bhpv,bhp->bhv", S, k[:, t])
        S = S + torch.einsum("bhp,bhv->bhpv", k[:, t], (v[:, t] - read) * beta[:, t, :, None])
        outputs.append(torch.einsum("bhpv,bhp->bhv", S, q[:, t]))
    return torch.stack(outputs, 1), S


@pytest.mark.parametrize("length", [1, 7, CHUNK, CHUNK + 1, 2 * CHUNK + 9])
def test_chunks_are_the_recurrence(length: int) -> None:
    """float32 sums over at most a chunk: some hundred rounding steps of 6e-8 on values of size 1 to 5."""
    found, expected = gated_delta_rule(*inputs(length), None), by_token(*inputs(length), None)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() < 2e-5


def test_a_state_carries_a_sequence_over() -> None:
    whole = inputs(CHUNK + 20)
    first, second = ([part[:, :30] for part in whole], [part[:, 30:] for part in whole])
    out, state = gated_delta_rule(*first, None)
    rest, last = gated_delta_rule(*second, state)
    expected, final = gated_delta_rule(*whole, None)
    assert torch.allclose(torch.cat([out, rest], 1), expected, atol=1e-5)
    assert torch.allclose(last, final, atol=1e-5)


def test_gradients_are_those_of_the_recurrence() -> None:
    given = [part.requires_grad_() for part in inputs(CHUNK + 3)]
    weights = torch.randn(BATCH, CHUNK + 3, HEADS, VALUE, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad((gated_delta_rule(*given, None)[0] * weights).sum(), given)
    expected = torch.autograd.grad((by_token(*given, None)[0] * weights).sum(), given)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= 1e-4 * max(1.0, float(other.abs().max()))
