"""`gptq`: round every planned site by GPTQ on calibration text, block by block."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from aqtx.blockwise.block_records import BlockRecords
from aqtx.blockwise.block_runner import Runner
from aqtx.blockwise.block_stream import Stream, scratch_folder
from aqtx.blockwise.gptq_block import BlockRounder, Settings
from aqtx.blockwise.gptq_model import Walk
from aqtx.machine.memory import PeakMemory
from aqtx.numerics.gptq import Options
from aqtx.program.blocks import split_blocks
from aqtx.program.program import Program
from aqtx.program.site import Site
from aqtx.registry import Changes, Context, Pass, Walks, register
from aqtx.rotation.select import check_planned


@register("gptq")
@dataclass(frozen=True, kw_only=True)
class Gptq(Pass):
    """Round in the plan's formats so that each matrix's output on calibration text changes least.

    linear(x, W), H = sum x x^T  ->  codes of W that keep (W - Q) H (W - Q)^T small, per output row

    Blocks run in order; each sees the rounded blocks before it, and within a block attention comes
    before the feed-forward's gate and up, and those before down.

    Fields:
        damp_fraction: what is added to the diagonal of H, as a share of its mean; 0 trusts H as it is.
        order: `activation` rounds the columns with the strongest inputs first, `none` from left to right.
        block_size: columns that are rounded one at a time before their errors go on to all others; for speed.
        search_scales: before the columns, take for each block the scale of least error under the penalties that GPTQ
            itself will put on its columns, instead of the scale of the format's rule.
        sweeps: after the columns, visit every code again so many times at most, each time with all others held; a
            row is done when a sweep gains less than 0.1 % of its error. 0 rounds once.
        refit_scales: before the sweeps, move the blocks' scales to where the codes want them, within what the format
            can store; powers of two stay.
        prior: what H is drawn to where a matrix saw few tokens: `pooled`, the stack's own mean, or `isotropic`, all
            channels alike; `none` leaves H alone.
        weighting: weigh an expert's tokens by its gate's `score` or `squared_score`, or count each once: `none`.
        inputs: H from what `rounded` blocks before it put out, or from the `original` model.
        max_memory: bytes for moments, activations and the solver, within the recipe's own max_memory; null takes what
            that leaves, or half of what is free. Results do not depend on it.
        stream: where activations wait between blocks: `memory`, `disk`, or `auto`, on disk where they are large.
        tokens_per_batch: tokens that a block computes at a time.
    """

    stage = "round"

    requires = ("assign_plan",)

    damp_fraction: float = 0.01
    order: Literal["none", "activation"] = "activation"
    block_size: int = 32
    search_scales: bool = True
    sweeps: int = 4
    refit_scales: bool = True
    prior: Literal["pooled", "isotropic", "none"] = "pooled"
    weighting: Literal["none", "score", "squared_score"] = "none"
    inputs: Literal["rounded", "original"] = "rounded"
    max_memory: int | None = None
    stream: Literal["auto", "memory", "disk"] = "auto"
    tokens_per_batch: int = 2048

    def walks(self) -> tuple[Walks, int | None]:
        """Block by block, with moments."""
        return "rounding", None

    def validate(self) -> list[str]:
        """Numbers must make sense."""
        problems = []
        if not 0 <= self.damp_fraction <= 1:
            problems.append(f"damp_fraction must be from 0 to 1, it is {self.damp_fraction}")
        if self.sweeps < 0:
            problems.append(f"sweeps must not be negative, it is {self.sweeps}")
        for name in ("block_size", "tokens_per_batch", "max_memory"):
            value = getattr(self, name)
            if value is not None and value < 1:
                problems.append(f"{name} must be at least 1, it is {value}")
        return problems

    def find(self, program: Program) -> list[Site]:
        """Sites that the plan gives a packed format."""
        return [site for site in program.sites() if site.is_to_round]

    def apply(self, program: Program, sites: list[Site], context: Context) -> Changes:
        """Walk the blocks once; a block's codes are complete before the next one is touched."""
        check_planned(program)
        records = BlockRecords(program, context.work, f"gptq-{len(program.history)}")
        with PeakMemory() as peak, scratch_folder(context.work) as scratch:
            walk = self._walk(program, context, scratch)
            details = walk.run(sites, records, context)
        details["peak_memory_bytes"] = peak.num_bytes
        return Changes(changed=[site.name for site in sites], details=details)

    def _share(self, context: Context) -> int:
        """Of a limit for the whole process all that is left; of what is free a half; never more than its own limit."""
        room = context.room() // (2 if context.max_memory is None else 1)
        return room if self.max_memory is None else min(room, self.max_memory)

    def _walk(self, program: Program, context: Context, scratch: Path) -> Walk:
        """The blocks, the stream at its start, and a budget for what is computed on the way."""
        ids = context.calibration()
        limit = context.ranks.smallest(self._share(context))
        blocks = split_blocks(program.graph, program.weights.specs)
        stream_bytes = ids.numel() * int(program.config.get("hidden_size", 0)) * program.dtype.itemsize
        on_disk = self.stream == "disk" or (self.stream == "auto" and stream_bytes > limit // 4)
        batch_size = max(self.tokens_per_batch // ids.shape[1], 1)
        stream = Stream(-(-len(ids) // batch_size), scratch if on_disk else None)
        runner = Runner(program, stream, context.device, context.ranks)
        runner.start(ids, batch_size)
        # a quarter for activations on their way, the rest for moments and the solver
        budget = limit - limit // 4 - max(map(runner.num_bytes, blocks)) - (0 if on_disk else stream_bytes)
        settings = Settings(
            solver=Options(
                damp_fraction=self.damp_fraction,
                order=self.order,
                block_size=self.block_size,
                search_scales=self.search_scales,
                refit_scales=self.refit_scales,
                sweeps=self.sweeps,
            ),
            prior=self.prior,
            weighting=self.weighting,
            rounded_inputs=self.inputs == "rounded",
            budget=budget,
        )
        return Walk(runner, blocks, BlockRounder(runner, settings))
