"""A program as a trainable function: ids -> logits and the router logits of every mixture, what trains as arguments.

The student computes with the values of the codes (`rounded`) and with quantized activations where the plan has them;
the teacher is the same graph over the weights before rounding, without activation quantization. What trains is
a float32 master that is rounded to its parameter's dtype on every call, so what is trained is what will be stored.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from aqtx.errors import InputError
from aqtx.program.inserted_ops import ACTIVATION_OPS
from aqtx.program.program import Program, bind
from aqtx.program.site import GROUPED_LINEAR, Site, weight_node


@dataclass(frozen=True)
class Routed:
    """A bound graph that also returns router logits, with the weights' names of those routers in its order."""

    module: fx.GraphModule
    routers: tuple[str, ...]  # weight names of the routers, in graph order

    def __call__(self, ids: Tensor, trained: Mapping[str, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """ids [B, S] -> logits [B, S, V] and per router logits [B * S, E]; `trained` replaces weights by name."""
        values = {name: value.to(self.module.get_parameter(name).dtype) for name, value in (trained or {}).items()}
        logits, *routed = torch.func.functional_call(self.module, values, (ids,))
        return logits, tuple(router.flatten(0, -2) for router in routed)


def routed(program: Program, *, rounded: bool) -> Routed:
    """The student of a program, or with `rounded` False its teacher."""
    view = program if rounded else program.without_codes()
    source = program.entries["score"]
    names = [node.target for node in source.graph.nodes if node.op == "get_attr"]
    values = view.parameters(name for name in names if name in view.weights.specs)
    buffers = {name: view.buffers[name] for name in names if name in view.buffers}
    module = bind(source, values, buffers, program.device)
    if not rounded:
        _drop_activation_quantization(module.graph)
    routers = _return_router_logits(module, router_sites(program))
    module.recompile()
    return Routed(module, routers)


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


def _return_router_logits(module: fx.GraphModule, sites: list[Site]) -> tuple[str, ...]:
    wanted = {site.weight for site in sites}
    [output] = [node for node in module.graph.nodes if node.op == "output"]
    found = {}
    for node in module.graph.nodes:
        weight = weight_node(node)
        if weight is not None and weight.target in wanted:
            found[str(weight.target)] = node
    [logits] = output.all_input_nodes
    output.args = ((logits, *found.values()),)
    module.graph._codegen = fx.graph.CodeGen()  # a plain tuple out, ids in
    return tuple(found)


def _drop_activation_quantization(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        if node.target in ACTIVATION_OPS:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
