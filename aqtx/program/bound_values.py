"""Parameters of a bound graph: read, put in, and taken out where no node reads them any more."""

import torch
from torch import Tensor, fx, nn


def value_of(module: nn.Module, node: fx.Node) -> Tensor:
    """The tensor that a get_attr node names."""
    owner, _, leaf = str(node.target).rpartition(".")
    value: Tensor = getattr(module.get_submodule(owner), leaf)
    return value


def put_value(module: fx.GraphModule, name: str, value: Tensor, before: fx.Node) -> fx.Node:
    """A new parameter of the module under a name without dots, and the node that reads it."""
    module.register_parameter(name, nn.Parameter(value, requires_grad=False))
    with module.graph.inserting_before(before):
        node = module.graph.get_attr(name)
    node.meta["val"] = torch.empty_like(value, device="meta") if type(value) is Tensor else value
    return node


def forget_unread(module: fx.GraphModule) -> None:
    """Drop nodes and parameters that nothing reads, so that they take no memory and no place in a package."""
    module.graph.eliminate_dead_code()  # writes into a cache stay
    read = {node.target for node in module.graph.nodes if node.op == "get_attr"}
    for name, _ in [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]:
        if name not in read:
            owner, _, leaf = name.rpartition(".")
            delattr(module.get_submodule(owner), leaf)
    module.graph.lint()
    module.recompile()
