"""Run passes in order: verify, time and report each one."""

import gc
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from aqtx.errors import InputError
from aqtx.machine.memory import PeakMemory, release_unused
from aqtx.machine.one_dnn import keep_few_kernels
from aqtx.program.program import Program
from aqtx.registry import Calibration, Changes, Context, Pass
from aqtx.runs.verify import Probe, check_graphs, compare, probe_batch, probe_outputs


@dataclass
class PassRow:
    """One line of the report: what a pass did, and how long it took."""

    name: str
    seconds: float
    changes: Changes
    peak_memory_bytes: int  # of the process while the pass ran: RssAnon + RssShmem
    max_difference: float | None = None
    tolerance: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The row as `report.json` holds it."""
        return {
            "name": self.name,
            "seconds": round(self.seconds, 3),
            "peak_memory_bytes": self.peak_memory_bytes,
            "changed": len(self.changes.changed),
            "refused": [{"site": refusal.site, "why": refusal.why} for refusal in self.changes.refused],
            "max_difference": self.max_difference,
            "tolerance": self.tolerance,
            "details": self.changes.details,
        }


@dataclass
class Run:
    """A program on its way through passes, with the rows so far."""

    program: Program
    context: Context
    rows: list[PassRow] = field(default_factory=list)
    first_place: int = 0  # place in the recipe of the first pass to run, for error messages

    def execute(self, passes: Iterable[Pass], after_pass: Callable[["Run"], None] | None = None) -> Program:
        """Run the passes in order.

        Raises:
            InputError: with all that can be said against any of them beforehand, or what one of them found.
        """
        passes = list(passes)
        if problems := misfits(self.program, passes, self.first_place):
            raise InputError(*problems)
        for place, step in enumerate(passes, self.first_place):
            self._require(step, place)
            self.rows.append(self._run_pass(step, place))
            self.program.history.append(step.name)
            if after_pass is not None:
                after_pass(self)
        return self.program

    def _require(self, step: Pass, place: int) -> None:
        missing = [name for name in step.requires if name not in self.program.history]
        if missing:
            raise InputError(
                f"passes.{place}.{step.name}: needs `{missing[0]}` before it; add `- {missing[0]}` to the passes"
            )

    def _run_pass(self, step: Pass, place: int) -> PassRow:
        probe = probe_batch(self.program, self.context.seed) if step.exact else None
        before = probe_outputs(self.program, probe) if probe is not None else None
        started = time.perf_counter()
        try:
            with PeakMemory() as peak:
                changes = step.run(self.program, self.context)
            if step.stage == "train":
                gc.collect()  # graph modules hold each other, and the weights that they were bound to
            release_unused()  # the next pass counts on it
        except InputError as error:
            raise InputError(*(f"passes.{place}.{step.name}: {problem}" for problem in error.problems)) from error
        row = PassRow(step.name, time.perf_counter() - started, changes, peak.num_bytes)
        check_graphs(self.program)
        if probe is not None and before is not None:
            self._check_exact(row, before, probe_outputs(self.program, probe))
        return row

    def _check_exact(self, row: PassRow, before: Probe, after: Probe) -> None:
        depth = len({site.node for site in self.program.sites()})
        difference = compare(before, after, depth)
        row.max_difference, row.tolerance = difference.largest, difference.tolerance
        if before.routers:
            row.changes.details["router"] = {"difference": difference.router, "rerouted_tokens": difference.rerouted}
        moved = max(difference.largest, difference.router)
        if not moved <= difference.tolerance or difference.rerouted:
            raise RuntimeError(
                f"pass {row.name} must keep the function, but logits moved by {moved:.2e} of their largest value "
                f"(rounding in float64 explains {difference.tolerance:.2e}) and {difference.rerouted} tokens "
                "changed experts"
            )


def misfits(program: Program, passes: Iterable[Pass], first_place: int = 0) -> list[str]:
    """What can be said against passes before the first of them runs, with their places."""
    return [
        f"passes.{place}.{step.name}: {problem}"
        for place, step in enumerate(passes, first_place)
        for problem in step.validate() or step.misfits(program)
    ]


def _check_ids(ids: Tensor, vocab_size: int | None) -> None:
    """InputError unless ids are whole numbers [num_sequences, length] that the model knows."""
    if ids.dim() != 2 or not ids.numel() or ids.is_floating_point() or ids.is_complex() or ids.dtype is torch.bool:
        found = f"{ids.dtype} {list(ids.shape)}"
        raise InputError(f"calibration must be token ids [num_sequences, length], whole numbers, not {found}")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or (vocab_size is not None and high >= vocab_size):
        raise InputError(f"calibration ids go from {low} to {high}, the model's from 0 to {vocab_size}, exclusive")


def run(
    program: Program, passes: Iterable[Pass], *, calibration: Tensor | Calibration | None = None, seed: int = 0
) -> Program:
    """Run passes over a program and return it.

    Args:
        program: from `aqtx.trace`; changed in place.
        passes: in the order in which they run.
        calibration: token ids [num_sequences, length] for the passes that look at activations; of several domains as
            `aqtx.registry.Calibration.mix({domain: (ids, weight), ...})`.
        seed: of everything random.

    Raises:
        InputError: a pass lacks one that must come before it, or what it needs is missing or no token ids.
    """
    keep_few_kernels()
    context = Context(seed=seed, device=program.device, quiet=False)
    if calibration is not None:
        ids = calibration.ids if isinstance(calibration, Calibration) else calibration
        _check_ids(ids, program.config.get("vocab_size"))
        context.load_calibration = lambda: calibration
    return Run(program, context).execute(passes)
