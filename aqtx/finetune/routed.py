"""A program as a trainable function: ids -> logits and the router logits of every mixture, routers as arguments.

The student computes with the values of the codes (`rounded`) and with quantized activations where the plan has them;
the teacher is the same graph over the weights before rounding, without activation quantization. Trained routers are
float32 masters that are rounded to the graph's dtype on every call, so what is trained is what will be stored.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from aqtx.program.inserted_ops import ACTIVATION_OPS
from aqtx.program.program import Program, bind
from aqtx.program.site import Site, weight_node

ROUTERS = ("router", "shared_expert_gate")


@dataclass(frozen=True)
class Routed:
    """A bound graph that also returns router logits, with the weights' names of those routers in its order."""

    module: fx.GraphModule
    routers: tuple[str, ...]  # weight names of the routers, in graph order
    dtype: torch.dtype

    def __call__(self, ids: Tensor, trained: Mapping[str, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """ids [B, S] -> logits [B, S, V] and per router logits [B * S, E]; `trained` replaces weights by name."""
        values = {name: value.to(self.dtype) for name, value in (trained or {}).items()}
        logits, *routed = torch.func.functional_call(self.module, values, (ids,))
        return logits, tuple(router.flatten(0, -2) for router in routed)


def routed(program: Program, *, rounded: bool) -> Routed:
    """The student of a program, or with `rounded` False its teacher."""
    view = replace(program, emitted=False)  # a view without codes
    if rounded:
        view.codes = program.codes
    source = program.entries["score"]
    names = [node.target for node in source.graph.nodes if node.op == "get_attr"]
    values = view.parameters(name for name in names if name in view.weights.specs)
    buffers = {name: view.buffers[name] for name in names if name in view.buffers}
    module = bind(source, values, buffers, program.device)
    if not rounded:
        _drop_activation_quantization(module.graph)
    routers = _return_router_logits(module, router_sites(program))
    module.recompile()
    return Routed(module, routers, program.dtype)


def router_sites(program: Program) -> list[Site]:
    """The linears that score experts, not the gates of shared experts, in graph order."""
    return [site for site in program.sites() if site.category == "router"]


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
