"""Experts of many formats in one stack: both lowerings, gradients, and the stack's own accounting."""

import pytest
import torch
from torch import Tensor

from aqtx.errors import InputError
from aqtx.formats import MixedExperts, quantize
from aqtx.formats.grouped_linear import grouped_linear
from aqtx.formats.grouped_linear_packed import lowering
from tests.formats.cases import EVERY, MIX, mixed, normal

OFFSETS = [2, 2, 3, 9, 9, 12]  # experts without rows, with one, with many


def products(x: Tensor, stack: Tensor, offsets: Tensor) -> Tensor:
    """One product per expert with the dequantized weight, in float64."""
    dense, out, start = stack.dequantize(torch.float64), [], 0
    for expert, end in enumerate(offsets.tolist()):
        out.append(x[start:end].double() @ dense[expert].t())
        start = end
    return torch.cat(out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", ["auto", "dense", "hit"])
def test_both_lowerings_are_the_experts_products(how: str, dtype: torch.dtype) -> None:
    stack, offsets = mixed(), torch.tensor(OFFSETS, dtype=torch.int32)
    x = normal(OFFSETS[-1], 128, seed=1).to(dtype)
    with lowering(how):
        y = grouped_linear(x, stack, offsets)
    exact = products(x, stack, offsets)
    assert (y - exact).norm() <= 3 * torch.finfo(dtype).eps * exact.norm()


def test_without_the_kernel_the_same_comes_out(monkeypatch: pytest.MonkeyPatch) -> None:
    stack, offsets = mixed(), torch.tensor(OFFSETS, dtype=torch.int32)
    x = normal(OFFSETS[-1], 128, seed=1)
    y = grouped_linear(x, stack, offsets)
    monkeypatch.setattr("aqtx.formats.kernel.available", lambda: False)
    torch.testing.assert_close(grouped_linear(x, stack, offsets), y, rtol=1e-5, atol=1e-5)


def test_no_tokens_and_no_hits() -> None:
    stack = mixed()
    assert grouped_linear(torch.empty(0, 128), stack, torch.zeros(6, dtype=torch.int32)).shape == (0, 64)


@pytest.mark.parametrize("name", EVERY)
def test_activations_and_routers_train_through_every_format(name: str) -> None:
    stack = quantize(normal(4, 32, 64), name)
    offsets = torch.tensor([3, 3, 5, 9], dtype=torch.int32)
    x, gate = normal(9, 64).requires_grad_(), torch.rand(9, 1).requires_grad_()
    (gate * grouped_linear(x, stack, offsets)).square().sum().backward()
    other, other_gate = x.detach().clone().requires_grad_(), gate.detach().clone().requires_grad_()
    (other_gate * grouped_linear(other, stack.dequantize(), offsets)).square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(gate.grad, other_gate.grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("how", ["dense", "hit"])
def test_gradients_of_a_mixed_stack(how: str) -> None:
    stack, offsets = mixed().to(torch.float32), torch.tensor(OFFSETS, dtype=torch.int32)
    x = normal(OFFSETS[-1], 128).requires_grad_()
    with lowering(how):
        grouped_linear(x, stack, offsets).sum().backward()
    other = x.detach().clone().requires_grad_()
    grouped_linear(other, stack.dequantize(), offsets).sum().backward()
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-4, atol=1e-4)


def test_a_stack_knows_its_experts() -> None:
    stack = mixed()
    assert stack.formats == [*MIX, "bf16"]
    assert stack.shape == (6, 64, 128)
    assert stack.num_bytes == sum(
        expert.num_bytes if hasattr(expert, "num_bytes") else expert.numel() * 2
        for expert in (stack.expert(index) for index in range(6))
    )
    for index in range(6):
        expert = stack.expert(index)
        values = expert.dequantize() if hasattr(expert, "dequantize") and expert.dtype else expert
        assert torch.equal(stack[index].dequantize() if index < 5 else stack[index], values)
        assert torch.equal(stack.dequantize()[index], values)


def test_experts_of_one_stack_share_a_shape() -> None:
    with pytest.raises(InputError, match="share a shape"):
        MixedExperts.from_experts([quantize(normal(8, 64), "int4"), normal(4, 64)], torch.float32)


def test_copying_between_different_mixes_is_refused() -> None:
    one = MixedExperts.from_experts([quantize(normal(8, 64), "int4")], torch.float32)
    other = MixedExperts.from_experts([quantize(normal(8, 64), "int8")], torch.float32)
    with pytest.raises(ValueError, match="formats differ"):
        one.copy_(other)
