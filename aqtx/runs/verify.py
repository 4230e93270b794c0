"""Checks that the pipeline makes after every pass: sound graphs, and the same function where claimed.

A pass that claims to keep the function is held to it in float64: weights and arithmetic are upcast, so
that what is left is rounding of 1e-16 and a mistake of 1e-9 shows. The graph is run one node at a
time and a weight is loaded when its node comes: memory holds one parameter, whatever the model's size.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from aqtx.formats import dequantized
from aqtx.program.inserted_ops import ACTIVATION_OPS
from aqtx.program.program import Program

_PROBE_SHAPE = (2, 32)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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


@dataclass(eq=False)
class Probe:
    """What a program makes of the probe batch."""

    logits: Tensor
    routers: list[Tensor] = field(default_factory=list)  # logits of each router [T, E]
    scores: list[Tensor] = field(default_factory=list)  # what each top-k chose from [T, E]
    chosen: list[Tensor] = field(default_factory=list)  # and what it chose [T, k]


@dataclass(frozen=True)
class Lazy:
    """A parameter or buffer that is loaded by the node that reads it."""

    load: Callable[[], Tensor]


class ProbeInterpreter(fx.Interpreter):
    """Runs a score graph in one floating dtype, loading each weight when it is read."""

    def __init__(self, program: Program, dtype: torch.dtype) -> None:
        super().__init__(program.entry("score"))
        self.program, self.dtype = program, dtype
        self.sites = program.sites_by_weight()
        self.routers = {site.node for sites in self.sites.values() for site in sites if site.category == "router"}
        self.probe = Probe(torch.empty(0))

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A promise to load."""
        return Lazy(lambda: self._load(str(target)).to(self.program.device))

    def run_node(self, n: fx.Node) -> Any:
        """Run a node, and keep what concerns the choice of experts."""
        value = super().run_node(n)
        if n in self.routers:
            self.probe.routers.append(value.double())
        if n.target is torch.ops.aten.topk.default:
            self.probe.scores.append(self.env[n.args[0]].double())  # type: ignore[index]
            self.probe.chosen.append(value[1])
        return value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Arguments loaded, and dtypes and devices those of the probe; activations are not rounded."""
        if target in ACTIVATION_OPS:
            return args[0]
        args, kwargs = fx.node.map_aggregate((args, kwargs), self._argument)
        return target(*args, **kwargs)

    def _argument(self, value: Any) -> Any:
        if isinstance(value, Lazy):
            return value.load()
        if isinstance(value, torch.dtype):
            return self.dtype if value in _FLOATS else value
        return self.program.device if isinstance(value, torch.device) else value

    def _load(self, name: str) -> Tensor:
        program = self.program
        if name in program.buffers:
            buffer = program.buffers[name]
            return buffer.to(self.dtype) if buffer.is_floating_point() else buffer
        if any(site.name in program.codes for site in self.sites.get(name, [])):
            [value] = program.parameters([name]).values()
            return dequantized(value).to(self.dtype)
        return dequantized(program.weights.precise(name, dtype=self.dtype)).to(self.dtype)


def probe_outputs(program: Program, ids: Tensor, dtype: torch.dtype = torch.float64) -> Probe:
    """Run the program on token ids with all weights and all arithmetic in `dtype`."""
    interpreter = ProbeInterpreter(program, dtype)
    with torch.no_grad():
        logits = interpreter.run(ids.to(program.device))
    interpreter.probe.logits = torch.as_tensor(logits).double()
    return interpreter.probe


@dataclass(frozen=True)
class Difference:
    """How far two probes are apart, relative to the largest value of what is compared."""

    largest: float  # of the logits
    tolerance: float  # what rounding explains
    router: float = 0.0  # of the router logits
    rerouted: int = 0  # tokens whose experts changed although the scores left no doubt


def compare(before: Probe, after: Probe, depth: int, dtype: torch.dtype = torch.float64) -> Difference:
    """Difference of two probes made in `dtype`.

    The tolerance follows the arithmetic: a dot product of length K errs by about sqrt(K) eps relative
    to its terms, and the errors of `depth` sequential products add up in quadrature; 32 covers K up
    to some thousands and the growth through the norms. A change of a token's experts counts
    where the gap of the scores at the border of the top k exceeds it.
    """
    tolerance = 32 * math.sqrt(depth) * torch.finfo(dtype).eps
    routers = [relative(one, other) for one, other in zip(before.routers, after.routers, strict=True)]
    rerouted = sum(
        _rerouted(scores, one, other, tolerance)
        for scores, one, other in zip(before.scores, before.chosen, after.chosen, strict=True)
    )
    return Difference(relative(before.logits, after.logits), tolerance, max(routers, default=0.0), rerouted)


def relative(before: Tensor, after: Tensor) -> float:
    """Largest difference by the largest value."""
    return float((after - before).abs().max() / before.abs().max().clamp_min(1e-30))


def _rerouted(scores: Tensor, before: Tensor, after: Tensor, tolerance: float) -> int:
    """Tokens whose set of experts differs and whose k-th and next scores lie further apart than the tolerance."""
    k = before.shape[-1]
    if k == scores.shape[-1]:
        return 0
    ranked = scores.sort(dim=-1, descending=True).values
    clear = ranked[..., k - 1] - ranked[..., k] > tolerance * ranked[..., 0]
    moved = (before.sort(dim=-1).values != after.sort(dim=-1).values).any(-1)
    return int((moved & clear).sum())
