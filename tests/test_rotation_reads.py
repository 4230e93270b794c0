"""A value that something else reads as well is not rotated: the walks back to the writers say who reads it."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import aqtx
from aqtx.program.site import LINEAR
from aqtx.rotation.attention_path import value_writer
from aqtx.rotation.residual_stream import writers
from aqtx.rotation.row_ops import Unproven

WIDTH, HEADS = 32, 2


class Peeking(nn.Module):
    """Attention and a residual stream; with `peek`, a value on the way is read once more."""

    def __init__(self, peek: str = "") -> None:
        super().__init__()
        self.hf_config = {"vocab_size": 16, "hidden_size": WIDTH}
        torch.manual_seed(0)
        self.embed, self.peek = nn.Embedding(16, WIDTH), peek
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.lm_head = nn.Linear(WIDTH, 16, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        q, k, v = (one(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for one in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        wide = self.o(mixed.transpose(1, 2).flatten(2))
        logits = self.lm_head(x + wide)
        seen = {"values": v, "mixed": mixed, "written": wide}.get(self.peek)
        return logits if seen is None else logits + seen.square().mean()


def linears(module: nn.Module) -> dict[str, torch.fx.Node]:
    """The linears of the traced graph by the weight's name."""
    nodes = aqtx.trace(module).graph.nodes
    return {str(node.args[1].target).split(".")[0]: node for node in nodes if node.target is LINEAR}


def test_without_another_reader_the_writers_are_found() -> None:
    found = linears(Peeking())
    assert value_writer(found["o"], WIDTH // HEADS) is found["v"]
    assert writers(found["o"], next(iter(found["o"].users))) == [found["o"]]


@pytest.mark.parametrize("peek", ["values", "mixed"])
def test_attention_whose_values_are_read_elsewhere_is_refused(peek: str) -> None:
    with pytest.raises(Unproven, match=r"square.* reads the output of .* as well"):
        value_writer(linears(Peeking(peek))["o"], WIDTH // HEADS)


def test_what_joins_the_stream_and_is_read_elsewhere_is_refused() -> None:
    writer = linears(Peeking("written"))["o"]
    adding = next(user for user in writer.users if user.target is torch.ops.aten.add.Tensor)
    with pytest.raises(Unproven, match=r"square.* reads the output of .* as well"):
        writers(writer, adding)
