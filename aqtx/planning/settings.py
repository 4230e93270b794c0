"""The fields of `assign_plan`, and what can be said against them without a model."""

from dataclasses import dataclass, field
from typing import Any, Literal

from aqtx.errors import nearest
from aqtx.sensitivity.selection import format_problems

Method = Literal[
    *("alpha", "error", "uniform", "alphaq", "ratio", "threshold", "front_back", "random", "manual")
]  # type: ignore[valid-type]
DEFAULT_KEEP = ("attention", "router", "shared_expert_gate", "lm_head")
UNBUDGETED = ("ratio", "threshold", "manual")  # their formats follow from the method itself
BUDGET_OPTIONAL = ("uniform", "front_back")
