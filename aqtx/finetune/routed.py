"""A program as a trainable function: ids -> logits and the router logits of every mixture, what trains as arguments.

The student computes with the values of the codes (`rounded`) and with quantized activations where the plan has them;
the teacher is the same graph over the weights before rounding, without activation quantization. What trains is
a float32 master that is rounded to its parameter's dtype on every call, so what is trained is what will be stored.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, fx

from aqtx.errors import InputError
from aqtx.finetune.pieces import Piece, Weights, computed, piece_of
from aqtx.program.blocks import whole
from aqtx.program.inserted_ops import ACTIVATION_OPS
from aqtx.program.program import Program
from aqtx.program.site import GROUPED_LINEAR, Site, weight_node

Outputs = tuple[Tensor, tuple[Tensor, ...]]  # logits [B, S, V], router logits [B * S, E] per layer
Head = Callable[[Outputs, slice], Tensor]  # outputs of some of the sequences, and which -> values of each, [b, ...]


class Scores(Protocol):
    """A trainable model; `routers` are the weights' names of its routers, in graph order."""

    @property
    def routers(self) -> tuple[str, ...]:
        """One name for each router logits that the outputs hold."""

    def scored(self, ids: Tensor, trained: Weights, head: Head) -> Tensor:
        """What `head` makes of the outputs for ids [B, S], all its parts in order; `trained` replaces weights."""

    def together(self, length: int, batch_size: int) -> int:
        """How many sequences of so many tokens to give at once where no gradient is wanted."""


@dataclass(frozen=True)
class Ends:
    """Where a graph begins and ends: its ids, its logits and its router logits by weight name."""

    ids: fx.Node
    logits: fx.Node
    routers: dict[str, fx.Node]

    def outputs(self, values: Mapping[fx.Node, Tensor]) -> Outputs:
        """Logits and router logits among values of nodes."""
        return values[self.logits], tuple(values[node].flatten(0, -2) for node in self.routers.values())


@dataclass(frozen=True)
class Routed:
    """A model in memory, as one piece."""

    program: Program
    piece: Piece
    ends: Ends

    @property
    def routers(self) -> tuple[str, ...]:
        """The weights' names of its routers, in graph order."""
        return tuple(self.ends.routers)

    def __call__(self, ids: Tensor, trained: Weights | None = None) -> Outputs:
        """ids [B, S] -> logits [B, S, V] and per router logits [B * S, E]; `trained` replaces weights by name."""
        found = self.piece.run(computed(self.program, trained or {}), ids)
        places = [self.piece.outputs.index(node) for node in (self.ends.logits, *self.ends.routers.values())]
        logits, *routed = (found[place] for place in places)
        return logits, tuple(router.flatten(0, -2) for router in routed)

    def scored(self, ids: Tensor, trained: Weights, head: Head) -> Tensor:
        """All sequences are one part."""
        return head(self(ids, trained), slice(0, len(ids)))

    def together(self, length: int, batch_size: int) -> int:
        """As many as in training."""
        return batch_size


def routed(program: Program, *, rounded: bool) -> Routed:
    """The student of a program, or with `rounded` False its teacher, with all weights in memory."""
    view, graph = side(program, rounded=rounded)
    ends, block = ends_of(program, graph), whole(graph)
    held = view.loaded(dict.fromkeys(str(node.target) for node in block.parameters))
    return Routed(view, piece_of(block, view, ends.routers.values(), held), ends)


def side(program: Program, *, rounded: bool) -> tuple[Program, fx.Graph]:
    """The program and graph of the student, or of the teacher: before rounding, activations not quantized."""
    if rounded:
        return program, program.graph
    graph = fx.Graph()
    graph.output(graph.graph_copy(program.graph, {}))
    _drop_activation_quantization(graph)
    return program.without_codes(), graph


def ends_of(program: Program, graph: fx.Graph) -> Ends:
    """The ends of a graph of the program."""
    wanted = {site.weight for site in router_sites(program)}
    by_weight = {str(weight.target): node for node in graph.nodes if (weight := weight_node(node)) is not None}
    [ids] = [node for node in graph.nodes if node.op == "placeholder"]
    [logits] = graph.output_node().all_input_nodes
    return Ends(ids, logits, {name: node for name, node in by_weight.items() if name in wanted})


def router_sites(program: Program) -> list[Site]:
    """The linears that score experts, not the gates of shared experts, in graph order."""
    return [site for site in program.sites() if site.category == "router"]


def experts_per_token(program: Program, routers: Sequence[Site]) -> int:
    """How many experts each token is given, by the top-k that the routers' scores feed.

    Raises:
        InputError: no top-k of a fixed number stands behind a router.
    """
    found = {_top_k_behind(site.node) for site in routers if site.category == "router"}
    if len(found) != 1 or None in found:
        names = ", ".join(site.name for site in routers[:3])
        raise InputError(f"the number of experts per token cannot be read from the graph behind {names}")
    return int(found.pop() or 0)


def _top_k_behind(router: fx.Node) -> int | None:
    """The k of the last top-k over this router's scores: one that groups experts comes before it."""
    seen, queue, last = {router}, deque([router]), None
    while queue:
        node = queue.popleft()
        if node.target is torch.ops.aten.topk.default and isinstance(node.args[1], int):
            last = node.args[1]
        for user in node.users:
            if user not in seen and user.target is not GROUPED_LINEAR and weight_node(user) is None:
                seen.add(user)
                queue.append(user)
    return last


def _drop_activation_quantization(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        if node.target in ACTIVATION_OPS:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
