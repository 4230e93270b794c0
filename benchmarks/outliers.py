"""Plant outlier channels into a model without changing what it computes.

A few channels of every linear's input are made larger by a power of two, in what writes them, and the
columns of what reads them smaller by the same factor: exact in bfloat16. Trained models of some size
have such channels by themselves; the shipped model is too small to have grown any.
"""

import torch
from torch import Tensor, fx

from aqtx.program.program import Program
from aqtx.program.weight_changes import Scale
from aqtx.rotation.attention_path import ATTENTION
from aqtx.rotation.residual_stream import NORM, readers
from aqtx.rotation.row_ops import Unproven, aten, is_linear, weight_name


def plant(program: Program, *, factor: float = 4.0, share: float = 0.03, seed: int = 0) -> None:
    """Scale a `share` of each input's channels by `factor`: behind norms, in v, and in the product before down."""
    generator = torch.Generator().manual_seed(seed)
    for node in list(program.graph.nodes):
        if node.target is NORM:
            _behind_norm(program, node, factor, share, generator)
        elif node.target is ATTENTION:
            _before_o(program, node, factor, share, generator)
        elif is_linear(node) and node.args[0].target is aten.mul.Tensor:
            _before_down(program, node, factor, share, generator)


def _scales(size: int, factor: float, share: float, generator: torch.Generator) -> Tensor:
    scales = torch.ones(size, dtype=torch.float64)
    scales[torch.randperm(size, generator=generator)[: max(round(size * share), 1)]] = factor
    return scales


def _behind_norm(program: Program, norm: fx.Node, factor: float, share: float, generator: torch.Generator) -> None:
    try:
        weights = [weight_name(reader) for reader in readers(norm)]
    except Unproven:  # q/k norms
        return
    gain = str(norm.args[2].target)  # type: ignore[union-attr]
    scales = _scales(norm.args[1][0], factor, share, generator)  # type: ignore[index]
    program.weights.change(gain, Scale(scales))
    for weight in weights:
        program.weights.change(weight, Scale(1 / scales))


def _before_o(program: Program, attention: fx.Node, factor: float, share: float, generator: torch.Generator) -> None:
    """Values and what reads them; only where each head has values of its own."""
    v = attention.args[2]
    while not is_linear(v):  # type: ignore[arg-type]
        v = v.args[0]  # type: ignore[union-attr]
    o = attention
    while not is_linear(o):
        [o] = o.users
    values, outputs = weight_name(v), weight_name(o)  # type: ignore[arg-type]
    rows, columns = program.weights.specs[values].shape[-2], program.weights.specs[outputs].shape[-1]
    if rows == columns:
        scales = _scales(rows, factor, share, generator)
        program.weights.change(values, Scale(scales, outputs=True))
        program.weights.change(outputs, Scale(1 / scales))


def _before_down(program: Program, down: fx.Node, factor: float, share: float, generator: torch.Generator) -> None:
    product = down.args[0]
    up = next(source for source in product.all_input_nodes if is_linear(source))  # type: ignore[union-attr]
    scales = _scales(program.weights.specs[weight_name(down)].shape[-1], factor, share, generator)
    program.weights.change(weight_name(up), Scale(scales, outputs=True))
    program.weights.change(weight_name(down), Scale(1 / scales))
