"""The models that `aqtx eval` compares: opened by name, or made on the fly from a plan."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from aqtx.checkpoint.open import open_program
from aqtx.passes.assign_plan import AssignPlan
from aqtx.passes.emit import Emit
from aqtx.passes.quantize import Quantize
from aqtx.program.program import Program
from aqtx.runs.pipeline import run


def open_arms(sources: Sequence[str], plan: Path | None = None, dtype: torch.dtype | None = None) -> dict[str, Program]:
    """Programs by name: quantized or Hugging Face folders, shipped or hub names, `NAME=SOURCE` to name one.

    A plan is applied by rounding to nearest and saved nowhere: the last source comes a second time under it.
    """
    arms: dict[str, Program] = {}
    for source in sources:
        name, _, place = source.rpartition("=")
        arms[_free(name or Path(place).name, arms)] = open_program(place, dtype, check_files=True)
    if plan is not None:
        planned = open_program(sources[-1].rpartition("=")[2], dtype)
        steps = [AssignPlan(method="manual", plan=str(plan)), Quantize(), Emit()]
        arms[_free(plan.stem, arms)] = run(planned, steps)
    return arms


def _free(name: str, taken: Mapping[str, Any]) -> str:
    """The name, or with a number behind it where it is taken."""
    return next(word for word in (name, *(f"{name}-{i}" for i in range(2, 100))) if word not in taken)
