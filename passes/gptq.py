"""`gptq`: round every planned site by GPTQ on calibration text, block by block."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from aqtx.blocks import split_blocks
from aqtx.calibrate import Runner
from aqtx.errors import InputError
from aqtx.memory import free_bytes
from aqtx.numerics.gptq import Options
from aqtx.program import Program, Site
from aqtx.registry import Changes, Context, Pass, register
from aqtx.round_block import BlockRounder, Settings
from aqtx.stream import Stream


@register("gptq")
@dataclass(frozen=True, kw_only=True)
class Gptq(Pass):
    """Round in the plan's formats so that each matrix's output on calibration text changes least.

    linear(x, W), H = sum x x^T  ->  codes of W that keep (W - Q) H (W - Q)^T small, per output row

    Blocks run in order; each sees the rounded blocks before it, and within a block attention comes
    before the feed-forward's gate and up, and those before down.
    """

    requires = ("assign_plan",)

    damp_fraction: float = 0.01
    order: Literal["none", "activation"] = "activation"
    block_size: int = 16
    prior: Literal["pooled", "isotropic", "none"] = "pooled"
    weighting: Literal["none", "score", "squared_score"] = "none"
    inputs: Literal["rounded", "original"] = "rounded"
    max_memory: int | None = None
    stream: Literal["auto", "memory", "disk"] = "auto"
    tokens_per_batch: int = 2048

    def validate(self) -> list[str]:
        """Numbers must make sense."""
        problems = []
        if self.damp_fraction < 0:
            problems.append(f"damp_fraction must not be negative, it is {self.damp_fraction}")
        for name in ("block_size", "tokens_per_batch", "max_memory"):
            value = getattr(self, name)
            if value is not None and value < 1:
                problems.append(f"{name} must be at least 1, it is {value}")
        return problems

    def find(self, program: Program) -> list[Site]:
        """Sites that the plan gives a packed format."""
        return [site for site in program.sites() if site.get("format") not in (None, "bf16")]

    def apply(self, program: Program, sites: list[Site], context: Context) -> Changes:
        """Walk the blocks once; a block's codes are complete before the next one is touched."""
        blocks = split_blocks(program.graph, program.weights.specs)
        ids = context.calibration()
        runner = self._runner(program, ids, context)
        rounder = BlockRounder(runner, Settings(Options()))
        nodes = {site.node: [other for other in sites if other.node is site.node] for site in sites}
        last = max((block.index for block in blocks if nodes.keys() & set(block.nodes)), default=-1)
        for block in context.progress(blocks[: last + 1], description="gptq"):
            weights = runner.load(block)
            planned = [site for node in block.nodes for site in nodes.get(node, [])]
            del planned, weights
        return Changes(changed=[site.name for site in sites])
