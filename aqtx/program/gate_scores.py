"""The gate scores of a mixture's rows, found by walking the graph from the experts' last product.

grouped_linear (down) -> index (back to token order) -> view -> mul by scores -> sum
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from aqtx.errors import InputError
from aqtx.program.blocks import Values
from aqtx.program.site import GROUPED_LINEAR

_INDEX = torch.ops.aten.index.Tensor
_MUL = torch.ops.aten.mul.Tensor
_VIEWS = (torch.ops.aten.view.default, torch.ops.aten.reshape.default, torch.ops.aten.unflatten.int)


@dataclass(frozen=True)
class GateScores:
    """Where the scores c [T, k, 1] and the way back to token order [T * k] are computed."""

    scores: fx.Node
    order: fx.Node
    power: int

    @property
    def nodes(self) -> tuple[fx.Node, fx.Node]:
        """What has to be computed."""
        return self.scores, self.order

    def weights(self, values: Values) -> Tensor:
        """c^power for each row sorted by expert: token-order row i was sorted row `order[i]`."""
        scores = values[self.scores].to(torch.float32).flatten()
        return torch.empty_like(scores).scatter_(0, values[self.order].flatten(), scores) ** self.power


def find_gate_scores(offsets: fx.Node, nodes: Collection[fx.Node], power: int) -> GateScores:
    """The scores that weigh the rows which `offsets` groups.

    Raises:
        InputError: the graph does not end in the pattern above.
    """
    grouped = GROUPED_LINEAR
    for node in nodes:
        if node.target is not grouped or node.args[2] is not offsets:
            continue
        for index in node.users:
            if index.target is _INDEX and index.args[0] is node:
                found = _scores_behind(index)
                if found is not None:
                    [order] = _nodes(index.args[1])
                    return GateScores(found, order, power)
    raise InputError("weighting: the gate scores of this model's experts cannot be found in its graph; use `none`")


def _scores_behind(index: fx.Node) -> fx.Node | None:
    """The other factor of the first product behind views of `index`."""
    node: fx.Node = index
    while len(node.users) == 1:
        [user] = node.users
        if user.target in _VIEWS:
            node = user
            continue
        if user.target is _MUL:
            [other] = [argument for argument in user.all_input_nodes if argument is not node]
            return other
        return None
    return None


def _nodes(arguments: Any) -> list[fx.Node]:
    return [argument for argument in arguments if isinstance(argument, fx.Node)]


def is_inside_experts(source: fx.Node, offsets: fx.Node, nodes: Collection[fx.Node]) -> bool:
    """Whether rows have been through an expert already: each expert then has a space of its own."""
    grouped, among, queue, seen = GROUPED_LINEAR, set(nodes), [source], set[fx.Node]()
    while queue:
        node = queue.pop()
        if node in seen or node not in among:
            continue
        seen.add(node)
        if node.target is grouped and node.args[2] is offsets:
            return True
        queue.extend(node.all_input_nodes)
    return False
