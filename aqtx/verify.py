"""Checks that the pipeline makes after every pass: sound graphs, and the same function where claimed."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from aqtx.program import Program, bind

_PROBE_SHAPE = (2, 32)


def check_graphs(program: Program) -> None:
    """Lint every entry and compare the parameters it names with the weights that exist."""
    for name, graph_module in program.entries.items():
        graph_module.graph.lint()
        known = program.weights.specs.keys() | program.buffers.keys()
        missing = {str(node.target) for node in graph_module.graph.nodes if node.op == "get_attr"} - known
        if missing:
            raise RuntimeError(f"entry {name!r} reads {sorted(missing)[0]!r}, which is no weight of the program")


def probe_batch(program: Program, seed: int) -> Tensor:
    """Random token ids to compare functions on: [2, 32]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, int(program.config["vocab_size"]), _PROBE_SHAPE, generator=generator)


def probe_outputs(program: Program, ids: Tensor) -> Tensor:
    """Logits on the probe with all weights and all arithmetic in float32, float64 logits back."""
    source = program.entry("score")
    names = {str(node.target) for node in source.graph.nodes if node.op == "get_attr"}
    values = program.parameters(name for name in program.weights.names() if name in names)
    upcast = {name: dequantized(value).float() for name, value in values.items()}
    buffers = {name: value for name, value in program.buffers.items() if name in names}
    module = bind(source, upcast, buffers, program.device)
    retype(module, program.dtype, torch.float32)
    with torch.no_grad():
        return torch.as_tensor(module(ids.to(program.device))).double()


def dequantized(value: Tensor) -> Tensor:
    """A plain tensor of what a parameter stands for."""
    return value.dequantize() if hasattr(value, "qdata") or hasattr(value, "expert") else value


def retype(module: fx.GraphModule, before: torch.dtype, after: torch.dtype) -> None:
    """Point every dtype argument of a graph that says `before` to `after`."""
    for node in module.graph.nodes:
        node.args = tuple(after if argument == before and isinstance(argument, torch.dtype) else argument for argument in node.args)
        node.kwargs = {key: after if value == before and isinstance(value, torch.dtype) else value for key, value in node.kwargs.items()}
    module.recompile()


@dataclass(frozen=True)
class Difference:
    """Largest change of a logit relative to the largest logit, and what float32 may explain."""

    largest: float
    tolerance: float


def compare(before: Tensor, after: Tensor, depth: int) -> Difference:
    """Difference of two probe outputs.

    The tolerance follows the arithmetic: a dot product of length K in float32 errs by about
    sqrt(K) eps relative to its terms, and the errors of `depth` sequential products add up in
    quadrature; 32 covers K up to some thousands and the growth through the norms.
    """
    scale = before.abs().max().clamp_min(1e-30)
    largest = float((after - before).abs().max() / scale)
    return Difference(largest, 32 * math.sqrt(depth) * torch.finfo(torch.float32).eps)
