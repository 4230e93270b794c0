"""Which experts each token is sent to, noted while a model runs."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from aqtx.errors import InputError
from aqtx.program.cache_spec import CacheSpec, of_graph
from aqtx.program.program import Program
from aqtx.program.site import GROUPED_LINEAR

_TOPK = torch.ops.aten.topk.default


class Routes(Protocol):
    """A model that tells its choices; `caches` are those that it reads behind ids, positions and starts."""

    device: torch.device
    num_tokens: int  # of its vocabulary
    caches: list[CacheSpec]

    def read(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [rows, S, V], and counts [rows, L, E] of the tokens that each expert gets."""


class Choices:
    """The mixtures of a graph, in its order."""

    def __init__(self, graph: fx.Graph) -> None:
        self.nodes = routing_nodes(graph)
        if not self.nodes:
            raise InputError("calibration source ebss: the model has no experts to balance")

    def usage(self, chosen: Sequence[Tensor], num_rows: int) -> Tensor:
        """Counts [rows, L, E] of the experts chosen at each node, for inputs of `num_rows` sequences."""
        width = max(self.nodes.values())
        return torch.stack([F.one_hot(one.view(num_rows, -1), width).sum(1) for one in chosen], 1).float()


class Routed(fx.Interpreter):
    """Runs an entry with all weights in memory."""

    def __init__(self, program: Program, entry: str = "step") -> None:
        module = program.module(entry)
        assert isinstance(module, fx.GraphModule)
        super().__init__(module)
        self._choices, self._chosen = Choices(module.graph), list[Tensor]()
        self.device, self.num_tokens = program.device, vocabulary_of(program, entry)
        self.caches = of_graph(program.entry(entry))

    def run_node(self, n: fx.Node) -> Any:
        """Note the chosen experts on the way."""
        value = super().run_node(n)
        if n in self._choices.nodes:
            self._chosen.append(value)
        return value

    def read(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [rows, S, V], and counts [rows, L, E] of the tokens that each expert gets."""
        self._chosen = []
        logits = self.run(*inputs)
        return logits, self._choices.usage(self._chosen, len(inputs[0]))


def vocabulary_of(program: Program, entry: str) -> int:
    """How many tokens an entry tells apart."""
    return int(program.entry(entry).graph.output_node().all_input_nodes[0].meta["val"].shape[-1])


def routing_nodes(graph: fx.Graph) -> dict[fx.Node, int]:
    """The node of each mixture that holds the chosen experts [T, k], and the number of its experts."""
    found: dict[fx.Node, int] = {}
    for node in graph.nodes:
        if node.op != "call_function" or node.target is not GROUPED_LINEAR:
            continue
        queue, seen = [node.args[2]], set()
        while queue:  # breadth first: the nearest top-k is the one that decides
            at = queue.pop(0)
            if at.op == "call_function" and any(source.target is _TOPK for source in at.all_input_nodes):
                if at.args[1:] == (1,):
                    found.setdefault(at, int(node.args[1].meta["val"].shape[0]))
                    break
                continue
            queue += [source for source in at.all_input_nodes if source not in seen]
            seen.update(at.all_input_nodes)
    return found
