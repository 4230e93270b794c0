"""What happens when one matrix alone is rounded, by trying it on calibration text.

    block  squared change of the block's output, relative to the output: needs one block at a time
    loss   Kullback-Leibler divergence of the model's predictions, in nats per token: runs all later blocks too

The divergence is never negative and has no first-order term, so a few thousand tokens show changes that the
loss itself would hide in its noise. Annotations: `trial` and `trial_loss`, {format: value}.

One block's weights are in memory at a time. What each trial has changed so far waits between two blocks, in memory or
on disk, until all trials have been through the block.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, fx

from aqtx.blockwise.block_runner import Runner
from aqtx.blockwise.block_stream import Stream, scratch_folder
from aqtx.blockwise.work_size import stream_bytes
from aqtx.formats import Format, fake_quantize
from aqtx.program.blocks import Block, Values, split_blocks
from aqtx.program.program import Program
from aqtx.program.site import Site
from aqtx.registry import Context
from aqtx.sensitivity.measured import Request, annotate, has

Measure = Literal["block", "loss"]
Trial = tuple[Site, Format]
KEYS: dict[Measure, Literal["trial", "trial_loss"]] = {"block": "trial", "loss": "trial_loss"}


def measure_trials(
    program: Program, wanted: Sequence[Request], context: Context, *, measure: Measure = "block", num_sequences: int = 4
) -> None:
    """Annotate the sites that lack a trial under their formats."""
    key = KEYS[measure]
    missing = [(site, formats) for site, formats in wanted if not has(site, key, formats)]
    if not missing:
        return
    trials = [(site, fmt) for site, formats in missing for fmt in formats]
    found = try_all(program, trials, context.calibration()[:num_sequences], context, measure=measure)
    for (site, fmt), value in found.items():
        annotate(site, key, {fmt.name: value})


def try_all(
    program: Program, trials: Sequence[Trial], ids: Tensor, context: Context, *, measure: Measure
) -> dict[Trial, float]:
    """What each trial changes on the sequences ids [n, T], in the trials' order."""
    waiting = len(trials) if measure == "loss" else 0
    on_disk = stream_bytes(program, ids.numel()) * (waiting + 1) > context.room() // 4
    with scratch_folder(context.work) as scratch:
        runner = Runner(program, Stream(1, scratch if on_disk else None), context.device)
        runner.start(ids, len(ids))
        walk = _Walk(runner, split_blocks(program.graph, program.weights.specs), list(trials), measure)
        for block in context.progress(walk.blocks[: walk.num_blocks], description="trials"):
            walk.step(block)
    return {trial: walk.found[trial] for trial in trials}


@dataclass
class _Walk:
    """All trials on their way through the blocks; batch 0 of the stream is the model as it is."""

    runner: Runner
    blocks: list[Block]
    trials: list[Trial]
    measure: Measure
    found: dict[Trial, float] = field(default_factory=dict)
    _running: dict[Trial, int] = field(default_factory=dict)  # trial -> batch of the stream

    def __post_init__(self) -> None:
        """Blocks by what they use."""
        [self.output] = self.runner.program.graph.output_node().all_input_nodes
        self._at = {node: block.index for block in self.blocks for node in block.nodes}

    @property
    def num_blocks(self) -> int:
        """How many blocks have to be run."""
        return len(self.blocks) if self.measure == "loss" else 1 + max(self._at[site.node] for site, _ in self.trials)

    def step(self, block: Block) -> None:
        """One block for the model as it is, for the trials under way and for those that begin in it."""
        runner, weights = self.runner, self.runner.load(block)
        inputs = runner.stream.read(0, runner.device)
        exact = self._outputs(runner.run(block, inputs, weights), block)
        mine = [trial for trial in self.trials if self._at[trial[0].node] == block.index]
        for trial, batch in self._running.items():
            self._arrive(trial, batch, exact, self._outputs(self._run(block, batch, weights), block), block)
        for trial in mine:
            with _rounded(*trial, weights):
                values = self._outputs(runner.run(block, inputs, weights), block)
            if self.measure == "block":
                self.found[trial] = relative_change(exact, values, set(block.nodes))
            elif block is self.blocks[-1]:
                self.found[trial] = divergence(exact[self.output], values[self.output])
            else:
                self._running[trial] = runner.stream.append(values)
        runner.stream.write(0, exact)

    def _run(self, block: Block, batch: int, weights: Values) -> Values:
        return self.runner.run(block, self.runner.stream.read(batch, self.runner.device), weights)

    def _arrive(self, trial: Trial, batch: int, exact: Values, values: Values, block: Block) -> None:
        """What a block made of a trial that began earlier: compared behind the last one, else kept."""
        if block is self.blocks[-1]:
            self.found[trial] = divergence(exact[self.output], values[self.output])
        else:
            self.runner.stream.write(batch, values)

    def _outputs(self, values: Values, block: Block) -> Values:
        """Predictions in place of logits, whose mean says nothing."""
        if block is self.blocks[-1]:
            values = {**values, self.output: _log_probabilities(values[self.output])}
        return values


@contextmanager
def _rounded(site: Site, fmt: Format, weights: Values) -> Iterator[None]:
    """The block's weights with one matrix rounded, for the while."""
    parameter = site.node.args[1]
    assert isinstance(parameter, fx.Node)
    W = weights[parameter] if site.expert is None else weights[parameter][site.expert]
    kept = W.clone()
    W.copy_(fake_quantize(W, fmt))
    try:
        yield
    finally:
        W.copy_(kept)


def relative_change(before: Values, after: Values, own: set[fx.Node]) -> float:
    """Squared change of the tensors that a block itself puts out, relative to them."""
    nodes = [node for node in before if node in own]
    moved = sum(float((after[node].double() - before[node].double()).square().sum()) for node in nodes)
    return moved / max(sum(float(before[node].double().square().sum()) for node in nodes), 1e-300)


def divergence(p: Tensor, q: Tensor) -> float:
    """Kullback-Leibler divergence of log-probabilities [tokens, V], in nats per token."""
    return float((p.exp() * (p - q)).sum(-1).mean(dtype=torch.float64))


def _log_probabilities(logits: Tensor) -> Tensor:
    return logits.flatten(0, -2).float().log_softmax(-1)
