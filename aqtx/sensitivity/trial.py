"""What happens when one matrix alone is rounded, by trying it on calibration text.

    block  squared change of the block's output, relative to the output: needs one block at a time
    loss   Kullback-Leibler divergence of the model's predictions, in nats per token: runs all later blocks too

The divergence is never negative and has no first-order term, so a few thousand tokens show changes that the
loss itself would hide in its noise. Annotations: `trial` and `trial_loss`, {format: value}.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx

from aqtx.formats import Format, fake_quantize
from aqtx.program.blocks import Block, Values, evaluate, split_blocks
from aqtx.program.program import Program
from aqtx.program.site import Site
from aqtx.registry import Context
from aqtx.sensitivity.measured import Request, annotate, has

Measure = Literal["block", "loss"]
KEYS: dict[str, str] = {"block": "trial", "loss": "trial_loss"}


@dataclass
class Trials:
    """A model's blocks with their inputs for one batch of text."""

    program: Program
    blocks: list[Block]
    weights: list[Values]
    inputs: list[Values]
    logits: Tensor  # log-probabilities [tokens, V]
    output: fx.Node

    @classmethod
    def prepare(cls, program: Program, ids: Tensor) -> "Trials":
        """Run the model once and keep what flows between blocks; all weights are resident."""
        blocks = split_blocks(program.graph, program.weights.specs)
        [placeholder] = [node for node in program.graph.nodes if node.op == "placeholder"]
        [output] = program.graph.output_node().all_input_nodes
        values: Values = {placeholder: ids.to(program.device)}
        weights, inputs = [], []
        for block in blocks:
            weights.append(_load(program, block))
            inputs.append(dict(values))
            values = _run(program, block, values, weights[-1])
        return cls(program, blocks, weights, inputs, _log_probabilities(values[output]), output)

    def block_of(self, site: Site) -> int:
        """The index of the block that uses a site."""
        return next(block.index for block in self.blocks if site.node in set(block.nodes))

    def change(self, site: Site, fmt: Format, measure: Measure) -> float:
        """What rounding this site alone changes."""
        at = self.block_of(site)
        weights = _rounded(site, self.weights[at], fmt)
        values = _run(self.program, self.blocks[at], self.inputs[at], weights)
        if measure == "block":
            return self._block_change(at, values)
        for later in range(at + 1, len(self.blocks)):
            values = _run(self.program, self.blocks[later], values, self.weights[later])
        q = _log_probabilities(values[self.output])
        return float((self.logits.exp() * (self.logits - q)).sum(-1).mean(dtype=torch.float64))

    def _block_change(self, at: int, values: Values) -> float:
        """Over the tensors that the block itself puts out."""
        before = self.inputs[at + 1] if at + 1 < len(self.inputs) else {self.output: self.logits}
        if at + 1 == len(self.inputs):
            values = {self.output: _log_probabilities(values[self.output])}
        own = [node for node in before if node in set(self.blocks[at].nodes)]
        moved = sum(float((values[node].double() - before[node].double()).square().sum()) for node in own)
        return moved / max(sum(float(before[node].double().square().sum()) for node in own), 1e-300)


def _load(program: Program, block: Block) -> Values:
    names = {node: str(node.target) for node in block.parameters}
    return {
        node: (program.buffers[name] if name in program.buffers else program.weights.get(name)).to(program.device)
        for node, name in names.items()
    }


def _run(program: Program, block: Block, values: Values, weights: Values) -> Values:
    with torch.no_grad():
        found = evaluate(block.nodes, {**values, **weights}, set(block.later), device=program.device)
    return {**{node: values[node] for node in block.later if node in values}, **found}


def _rounded(site: Site, weights: Values, fmt: Format) -> Values:
    """The block's weights with one matrix rounded."""
    parameter = site.node.args[1]
    assert isinstance(parameter, fx.Node)
    W = weights[parameter]
    if site.expert is None:
        return {**weights, parameter: fake_quantize(W, fmt)}
    changed = W.clone()
    changed[site.expert] = fake_quantize(W[site.expert], fmt)
    return {**weights, parameter: changed}


def _log_probabilities(logits: Tensor) -> Tensor:
    return logits.flatten(0, -2).float().log_softmax(-1)


def measure_trials(
    program: Program, wanted: Sequence[Request], context: Context, *, measure: Measure = "block", num_sequences: int = 4
) -> None:
    """Annotate the sites that lack a trial under their formats."""
    key = KEYS[measure]
    missing = [(site, formats) for site, formats in wanted if not has(site, key, formats)]
    if not missing:
        return
    trials = Trials.prepare(program, context.calibration()[:num_sequences])
    for site, formats in context.progress(missing, description="trials"):
        annotate(site, key, {fmt.name: trials.change(site, fmt, measure) for fmt in formats})
