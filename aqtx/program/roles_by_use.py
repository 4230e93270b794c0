"""The role of a weight matrix by what it does in the graph, whatever its name.

A router's output chooses experts: the rows of every grouped product are sorted by a top-k, and the linears behind
that top-k are routers. Queries, keys and values are the linears behind the three inputs of attention; what is behind
them in turn are latent projections. Linear attention and state-space layers have a convolution over positions of
their own. What has no evidence in the graph keeps the role of its name (`roles.py`).
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

from aqtx.program.roles import SHARED_LIKE, category_of, layer_of

aten = torch.ops.aten
LINEAR = aten.linear.default
GROUPED_LINEAR = torch.ops.aqtx.grouped_linear.default
ATTENTION = aten.scaled_dot_product_attention.default
_TOP_K = aten.topk.default
_CONVOLUTIONS = (aten.conv1d.default, aten.convolution.default)
_STATES = ("linear_attn_in", "linear_attn_out")

Nodes = list[fx.Node]
Roles = dict[fx.Node, str]


def roles_of(graph: fx.Graph, weights: Iterable[str]) -> dict[str, str]:
    """Category by parameter, of every matrix that a linear or grouped linear of the graph multiplies with."""
    found = _Finder(graph, set(weights)).roles()
    return {_weight(node): role for node, role in found.items()}


class _Finder:
    """One graph. Later findings do not overrule earlier ones."""

    def __init__(self, graph: fx.Graph, weights: set[str]) -> None:
        self.graph = graph
        self.linears = [node for node in graph.nodes if node.target in (LINEAR, GROUPED_LINEAR) and _is_matrix(node)]
        self.known = [node for node in self.linears if _weight(node) in weights]
        self.made: Roles = {}

    def roles(self) -> Roles:
        """Every linear's role."""
        for find in (self._routers, self._attention, self._states, self._head):
            find()
        for node in self.known:
            self.made.setdefault(node, category_of(_site(node)))
        self._beside_experts()
        return {node: self.made[node] for node in self.known}

    def _give(self, nodes: Iterable[fx.Node], role: str) -> None:
        for node in nodes:
            self.made.setdefault(node, role)

    def _routers(self) -> None:
        """Linears behind a top-k whose indices sort the rows of a grouped product, and what only feeds them."""
        for offsets in {node.args[2]: None for node in self.linears if node.target is GROUPED_LINEAR}:
            chosen = _behind([offsets], lambda node: node.target is _TOP_K)
            first = _behind([source for node in chosen for source in node.all_input_nodes], _is_linear)
            routers = [node for node in first if node.target is LINEAR]
            self._give(routers + _exclusive(routers), "router")

    def _attention(self) -> None:
        """Projections before and behind every attention."""
        for node in self.graph.nodes:
            if node.target is not ATTENTION:
                continue
            direct = {name: _nearest(node.args[place]) for place, name in enumerate("qkv")}
            both = [linear for group in direct.values() for linear in group]
            latent = dict.fromkeys(source for linear in both for source in _inputs_of(linear))
            fed = [linear for linear in both if _inputs_of(linear)]
            self._give([*fed, *latent], "attn_latent")
            self._give((linear for linear in both if both.count(linear) > 1), "attn_qkv")
            for name, linears in direct.items():
                self._give(linears, f"attn_{name}")
            self._output(node)

    def _output(self, attention: fx.Node) -> None:
        """The linears that read what attention mixed, and those of a gate that multiplies it on the way."""
        readers, passed = _ahead(attention)
        self._give(readers, "attn_o")
        for node in passed:
            others = [source for source in node.all_input_nodes if source not in passed and source is not attention]
            if node.target is aten.mul.Tensor and others:
                gates = _same_layer(_behind(others, _is_linear), readers)
                self._give((gate for gate in gates if gate not in readers), "attn_gate")

    def _states(self) -> None:
        """All linears of a module that convolves positions channel by channel: the one out, and those in."""
        owners = [_owner(node) for node in self.graph.nodes if node.target in _CONVOLUTIONS]
        widths = {_width(node) for node in self.graph.nodes if node.target is aten.embedding.default}
        for node in self.linears:
            if any(owner and _weight(node).startswith(f"{owner}.") for owner in owners):
                self._give([node], _STATES[_width(node) in widths and _leaf(node).startswith("out")])

    def _head(self) -> None:
        """The linear of no layer that the outputs come from."""
        for node in _behind(self.graph.output_node().all_input_nodes, _is_linear):
            if layer_of(_site(node)) is None:
                self._give([node], "lm_head")

    def _beside_experts(self) -> None:
        """Plain feed-forwards of a model with experts: shared in layers that have experts, dense elsewhere."""
        layers = {layer_of(_weight(node)) for node in self.linears if node.target is GROUPED_LINEAR}
        for node in self.linears:
            role = self.made.get(node, "")
            if layers and node.target is LINEAR and role in SHARED_LIKE:
                self.made[node] = "shared_expert" if layer_of(_weight(node)) in layers else SHARED_LIKE[role]


def _is_matrix(node: fx.Node) -> bool:
    weight = node.args[1]
    return isinstance(weight, fx.Node) and weight.op == "get_attr"


def _weight(node: fx.Node) -> str:
    return str(node.args[1].target)  # type: ignore[union-attr]


def _site(node: fx.Node) -> str:
    return _weight(node).removesuffix(".weight")


def _leaf(node: fx.Node) -> str:
    return _site(node).rpartition(".")[2]


def _width(node: fx.Node) -> Any:
    shape = getattr(node.meta.get("val"), "shape", (None,))
    return shape[-1]


def _owner(convolution: fx.Node) -> str | None:
    """The module that has a convolution with a filter a channel."""
    filters = convolution.args[1]
    if not isinstance(filters, fx.Node) or "val" not in filters.meta or filters.meta["val"].shape[1] != 1:
        return None
    named = _behind([filters], lambda node: node.op == "get_attr")
    return str(named[0].target).rpartition(".")[0].rpartition(".")[0] if named else None


def _is_linear(node: fx.Node) -> bool:
    return node.target in (LINEAR, GROUPED_LINEAR)


def _behind(starts: Iterable[Any], wanted: Callable[[fx.Node], bool], stop: Callable[[fx.Node], bool] = bool) -> Nodes:
    """The first nodes of a kind on every way back; `stop` ends a way (by default nothing does)."""
    found: Roles = {}
    queue, seen = [node for node in starts if isinstance(node, fx.Node)], set[fx.Node]()
    while queue:
        node = queue.pop()
        if node in seen:
            continue
        seen.add(node)
        if wanted(node):
            found[node] = ""
        elif stop is bool or not stop(node):
            queue.extend(node.all_input_nodes)
    return list(found)


def _ahead(start: fx.Node) -> tuple[Nodes, Nodes]:
    """The first linears on every way on, and the nodes on the way."""
    readers: Roles = {}
    queue, passed = list(start.users), Roles()
    while queue:
        node = queue.pop()
        if node in passed or node in readers:
            continue
        if _is_linear(node):
            readers[node] = ""
        elif not isinstance(node.meta.get("val"), torch.SymInt) and not _is_sum(node):
            passed[node] = ""
            queue.extend(node.users)
    return list(readers), list(passed)


def _nearest(start: Any) -> Nodes:
    """The linears behind an input of attention, of the latest layer among them: others are not its own."""
    found = [node for node in _behind([start], _is_linear) if node.target is LINEAR and _is_matrix(node)]
    last = max((layer_of(_weight(node)) or 0 for node in found), default=0)
    return [node for node in found if (layer_of(_weight(node)) or 0) == last]


def _inputs_of(linear: fx.Node) -> Nodes:
    """Linears of the same layer that a linear reads without a sum in between, as of a residual stream."""
    found = [node for node in _behind([linear.args[0]], _is_linear, _is_sum) if node.target is LINEAR]
    return _same_layer([node for node in found if _is_matrix(node)], [linear])


def _same_layer(nodes: Nodes, others: Nodes) -> Nodes:
    layers = defaultdict(bool, {layer_of(_weight(node)): True for node in others if _is_matrix(node)})
    return [node for node in nodes if _is_matrix(node) and layers[layer_of(_weight(node))]]


def _is_sum(node: fx.Node) -> bool:
    """Whether a node adds two values of one shape."""
    shapes = [getattr(node.meta.get("val"), "shape", None) for node in node.all_input_nodes]
    return node.target is aten.add.Tensor and len(shapes) == 2 and shapes[0] == shapes[1]


def _exclusive(linears: Nodes) -> Nodes:
    """Linears whose values are read for these alone."""
    found: Nodes = []
    for linear in linears:
        reader, node = linear, linear.args[0]
        while isinstance(node, fx.Node) and all(user is reader for user in node.users):
            if _is_linear(node) and _is_matrix(node):
                found.append(node)
            reader, node = node, node.args[0] if node.args else None
    return found
