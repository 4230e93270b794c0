"""Which parameters belong to the parts of a model that stay unquantized and may train."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import fx

from aqtx.program.program import Program
from aqtx.program.roles import GROUPS
from aqtx.program.site import LINEAR, Site

Part = Literal["router", "norm", "attention", "bias"]

_NORMS = (torch.ops.aten.rms_norm.default, torch.ops.aten.layer_norm.default)  # input, shape, weight, ...
_ON_THE_WAY = (torch.ops.aten.add.Tensor, torch.ops.aten.to.dtype, torch.ops.aten._to_copy.default)  # 1 + w, casts


def sites_of_parts(program: Program, parts: Sequence[Part]) -> list[Site]:
    """The matrices among them: routers, and what attention multiplies with."""
    roles = {role for part in parts for role in GROUPS.get(part, ())}
    return [site for site in program.sites() if site.category in roles]


def vectors_of_parts(program: Program, parts: Sequence[Part]) -> list[str]:
    """Gains of norms and biases of linears, by what they do in the graph; in graph order, each once."""
    found = []
    for node in program.graph.nodes:
        if node.op == "get_attr" and str(node.target) in program.weights.specs:
            kind = "norm" if _scales_a_norm(node) else "bias" if _is_added(node) else None
            if kind in parts:
                found.append(str(node.target))
    return list(dict.fromkeys(found))


def _scales_a_norm(parameter: fx.Node) -> bool:
    """Whether a norm's weight or bias is made of this parameter alone."""
    seen = [parameter]
    for node in seen:
        for user in node.users:
            if user.target in _NORMS and node in user.args[2:]:
                return True
            if user.target in _ON_THE_WAY and len(user.all_input_nodes) == 1:
                seen.append(user)
    return False


def _is_added(parameter: fx.Node) -> bool:
    """Whether a linear adds it to its products."""
    return any(user.target is LINEAR and parameter in user.args[2:] for user in parameter.users)
