"""Writes in place become values: same results as the module that writes, and nothing left that writes."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from aqtx.program.functional import NotUnderstoodError, functionalize
from aqtx.program.trace import canonical


def halves(x: Tensor) -> Tensor:
    """Two writes that fill what was not initialised, as transformers' latent attention does."""
    made = x.new_empty(x.shape)
    made[:, :3] = x[:, :3] * 2
    made[:, 3:] = x[:, 3:] + 1
    return made * x


def older_view(x: Tensor) -> Tensor:
    """A view that was taken before the write reads what was written; a copy does not."""
    made = x * 1
    seen, copied = made[1].view(2, 3), made[1].clone()
    made.add_(x)
    return seen.sum(0).sum() + 10 * copied.sum() + made.sum()


def through_views(x: Tensor) -> Tensor:
    """Written through a select of a transpose, then the result of the write is used too."""
    made = x * 1
    row = made.transpose(0, 1)[2]
    back = row.mul_(3)
    back.sub_(1)
    return made.flatten() * row.sum() + back.sum()


def reshaped(x: Tensor) -> Tensor:
    """Written through a reshape that is a view."""
    made = x * 1
    made.view(-1).unsqueeze(0)[:, 2:5].copy_(torch.ones(3))
    return made + x


def one_of_two(x: Tensor) -> Tensor:
    """topk returns two values of their own: writing into one is no write through a view."""
    values, _ = (x * 1).topk(2)
    values /= values.sum(-1, keepdim=True)
    return values + 1


def split_in_two(x: Tensor) -> Tensor:
    """Halves of one memory: torch's own way has to do it."""
    made = x * 1
    left, _ = made.split(3, -1)
    left.add_(1)
    return made + 1


class Calls(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def exported(function: Callable[[Tensor], Tensor]) -> fx.GraphModule:
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    made = torch.export.export(Calls(function), (torch.randn(4, 6),), dynamic_shapes=dynamic, strict=False)
    return canonical(made.module(check_guards=False))


@pytest.mark.parametrize("function", [halves, older_view, through_views, reshaped, one_of_two])
def test_graphs_compute_what_the_module_computes(function: Callable[[Tensor], Tensor]) -> None:
    graph_module, x = exported(function), torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    assert functionalize(graph_module.graph)
    graph_module = canonical(graph_module)
    assert not any(
        getattr(node.target, "_schema", None) and node.target._schema.is_mutable for node in graph_module.graph.nodes
    )
    assert torch.equal(graph_module(x.clone()), function(x.clone()))


def test_a_view_that_is_not_known_is_told() -> None:
    with pytest.raises(NotUnderstoodError, match="getitem"):
        functionalize(exported(split_in_two).graph)


def test_writes_into_inputs_stay() -> None:
    def cached(x: Tensor) -> Tensor:
        x.index_copy_(0, torch.zeros(1, dtype=torch.long), torch.ones(1, 6))
        return x + 1

    made = exported(cached)
    assert not functionalize(made.graph)
    x = torch.zeros(4, 6)
    canonical(made)(x)
    assert x[0].eq(1).all()
