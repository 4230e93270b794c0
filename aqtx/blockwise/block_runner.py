"""Second moments of every planned matrix's input, layer by layer, from a graph run on calibration text.

One block's weights and one residual stream are resident. Within a block, matrices are met in waves:
those whose inputs depend on no planned matrix of an earlier wave (q, k, v), then what they feed
(o), then gate and up, then down. A wave reruns the part of the block before it, with the
weights that earlier waves have rounded by then; matrices with the same input share one moment.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from aqtx.blockwise.block_stream import Stream
from aqtx.blockwise.input_moments import Moments
from aqtx.machine.ranks import ALONE, Ranks
from aqtx.program.blocks import Block, Values, ancestors, evaluate
from aqtx.program.gate_scores import GateScores
from aqtx.program.program import Program
from aqtx.program.site import LINEAR, Site


@dataclass(frozen=True)
class Stage:
    """Linear nodes that read one input, and the sites to round on them, by node."""

    source: fx.Node
    offsets: fx.Node | None
    sites: dict[fx.Node, list[Site]]

    @property
    def num_inputs(self) -> int:
        """K."""
        return next(iter(self.sites.values()))[0].shape[1]

    @property
    def experts(self) -> list[int]:
        """Experts with a site here, ascending; 0 stands for a plain matrix."""
        return sorted({site.expert or 0 for sites in self.sites.values() for site in sites})


@dataclass(frozen=True)
class Want:
    """Moments to collect at a stage; `pool` takes every so many rows, whichever expert they belong to."""

    stage: Stage
    moments: Moments
    scores: GateScores | None = None
    pool: int | None = None

    @property
    def reads(self) -> list[fx.Node]:
        """Values that are needed of each batch."""
        offsets = [] if self.stage.offsets is None else [self.stage.offsets]
        return [self.stage.source, *offsets, *(() if self.scores is None else self.scores.nodes)]

    def add(self, values: Values) -> None:
        """Take a batch."""
        rows = values[self.stage.source].flatten(0, -2)
        weights = None if self.scores is None else self.scores.weights(values)
        if self.pool is not None:
            self.moments.add(rows[:: self.pool], None, None if weights is None else weights[:: self.pool])
        else:
            offsets = None if self.stage.offsets is None else values[self.stage.offsets]
            self.moments.add(rows, offsets, weights)


def waves_of(block: Block, planned: Iterable[Site]) -> list[list[Stage]]:
    """Stages of a block in waves; no stage depends on one of its own or a later wave."""
    sites: dict[fx.Node, list[Site]] = {}
    for site in planned:
        sites.setdefault(site.node, []).append(site)
    depth: dict[fx.Node, int] = {}
    stages: dict[tuple[fx.Node, fx.Node | None, int], Stage] = {}
    for node in block.nodes:
        before = max((depth[source] for source in node.all_input_nodes if source in depth), default=0)
        depth[node] = before + (node in sites)
        if node not in sites:
            continue
        source, offsets = node.args[0], None if node.target is LINEAR else node.args[2]
        assert isinstance(source, fx.Node) and (offsets is None or isinstance(offsets, fx.Node))
        stage = stages.setdefault((source, offsets, before), Stage(source, offsets, {}))
        stage.sites[node] = sites[node]
    depths = sorted({wave for _, _, wave in stages})
    return [[stage for (_, _, wave), stage in stages.items() if wave == level] for level in depths]


@dataclass
class Runner:
    """Runs blocks on all batches: `weights` are the block's parameters, replaced as they are rounded."""

    program: Program
    stream: Stream
    device: torch.device
    ranks: Ranks = ALONE  # that share the batches, each running its own, and add up their moments

    @property
    def batches(self) -> Sequence[int]:
        """The batches that this rank runs."""
        return self.ranks.mine(range(len(self.stream)))

    def start(self, ids: Tensor, batch_size: int) -> None:
        """Put the token ids into the stream."""
        [placeholder] = [node for node in self.program.graph.nodes if node.op == "placeholder"]
        parts = ids.split(batch_size)
        for index in self.batches:
            self.stream.write(index, {placeholder: parts[index]})

    def num_bytes(self, block: Block) -> int:
        """Memory that the block's parameters take."""
        specs = [self.program.weights.specs.get(str(node.target)) for node in block.parameters]
        return sum(spec.numel * spec.dtype.itemsize for spec in specs if spec is not None)

    def load(self, block: Block) -> Values:
        """The block's parameters as the program computes with them, copies that may be written to."""
        program, values = self.program, {}
        for node in block.parameters:
            name = str(node.target)
            if name in program.buffers:
                values[node] = program.buffers[name].to(self.device)
            else:
                dtype = program.weights.specs[name].dtype
                values[node] = program.weights.get(name).detach().to(self.device, dtype, copy=True)
        return values

    def load_as_stands(self, block: Block) -> Values:
        """The block's parameters, codes where they were rounded, packed where they were emitted; not for writing."""
        found = self.program.loaded(str(node.target) for node in block.parameters)
        return {node: found[str(node.target)] for node in block.parameters}

    def advance(self, block: Block, weights: Values) -> None:
        """Run the whole block and hand its results on."""
        for batch in self.batches:
            values = self.stream.read(batch, self.device)
            self.stream.write(batch, self._run(block.nodes, values, weights, block.later))

    def run(self, block: Block, values: Values, weights: Values) -> Values:
        """What a block hands on, made of the values that flow into it."""
        return self._run(block.nodes, values, weights, block.later)

    def collect(self, block: Block, weights: Values, wanted: Sequence["Want"]) -> None:
        """Add all batches' inputs to the moments wanted."""
        keep = {node for want in wanted for node in want.reads}
        needed = ancestors(keep, block.nodes)
        nodes = [node for node in block.nodes if node in needed]
        for batch in self.batches:
            found = self._run(nodes, self.stream.read(batch, self.device), weights, keep)
            for want in wanted:
                want.add(found)
        for want in wanted:
            want.moments.add_ranks(self.ranks)
            want.moments.finish()

    def _run(self, nodes: Sequence[fx.Node], values: Values, weights: Values, keep: Iterable[fx.Node]) -> Values:
        with torch.no_grad():
            return evaluate(nodes, {**values, **weights}, set(keep), device=self.device)
