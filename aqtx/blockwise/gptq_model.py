"""Blocks one after another: round the planned matrices of each on what the blocks before it put out."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from aqtx.blockwise.block_records import BlockRecords
from aqtx.blockwise.block_runner import Runner
from aqtx.blockwise.gptq_block import BlockRounder, take_codes
from aqtx.program.blocks import Block, Values
from aqtx.program.site import Site
from aqtx.registry import Context


@dataclass
class Walk:
    """A pass over all blocks that have something to round."""

    runner: Runner
    blocks: list[Block]
    rounder: BlockRounder

    def run(self, sites: list[Site], records: BlockRecords, context: Context) -> dict[str, Any]:
        """Round `sites`; returns the report's details."""
        by_node: dict[fx.Node, list[Site]] = {}
        for site in sites:
            by_node.setdefault(site.node, []).append(site)
        last = max((block.index for block in self.blocks if by_node.keys() & set(block.nodes)), default=-1)
        rows: list[dict[str, Any]] = []
        channels: list[dict[str, Any]] = []
        for block in context.progress(self.blocks[: last + 1], description="gptq"):
            planned = [site for node in block.nodes for site in by_node.get(node, [])]
            weights = self.runner.load(block)
            payload = records.load(block.index)
            if not self.runner.ranks.all_agree(payload is not None):
                payload = None  # a rank that was stopped earlier than another lacks this block
            if payload is None:
                payload = self._round(block, weights, planned)
                records.save(block.index, [site.name for site in planned], payload)
            elif self.rounder.settings.rounded_inputs:
                take_codes(self.runner.program.codes, weights, planned)
            rows += payload["sites"]
            channels += payload["channels"]
            if block.index < last:
                self.runner.advance(block, weights)
            del weights  # before the next block's are read
        return {"sites": rows, "channels": channels}

    def _round(self, block: Block, weights: Values, planned: list[Site]) -> dict[str, Any]:
        """One block, and what is to be told of it."""
        rounded, channels = self.rounder.round(block, weights, planned), []
        for weight, largest in rounded.channels.items():
            median, high, top = largest.quantile(torch.tensor([0.5, 0.99, 1.0], device=largest.device)).tolist()
            channels.append({"weight": weight, "median": median, "p99": high, "largest": top})
        return {"sites": rounded.rows, "channels": channels}
