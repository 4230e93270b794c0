"""What a method of planning is: one record, which says everything that the rest of the program asks about it.

A method either has a `cost`, a table of what each site loses under each format, for which the allocator finds the least
total within the budget; or it has a rule, `choose`. `search` and `manual` have neither and are carried out apart.
A method reads the keys of `assign_plan` that its row names, and is given no others.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from aqtx.formats import Format
from aqtx.planning.question import Options
from aqtx.program.program import Program
from aqtx.program.site import Site
from aqtx.registry import Context, Walks
from aqtx.sensitivity.measured import Request

Own = Mapping[str, Any]  # values of the keys that a method's row names
Measure = Callable[[Program, Sequence[Request], Own, Context, int], dict[str, Any]]
Cost = Callable[[Sequence[Site], Sequence[Format], Own, int], Tensor]
Domains = Callable[[Sequence[Site], Sequence[Format], Own], dict[str, Tensor]]
Again = Callable[[Program, Sequence[Request], Own, Context, Sequence[tuple[Site, Format]]], dict[str, Tensor]]
Choose = Callable[[Options, Own, float | None], Tensor]

OF_ALL = ("method", "keep")
STANDARD = ("mxfp4", "mxfp6", "mxfp8")  # candidates where neither recipe nor method nor target names any
OF_DECISIONS = ("candidates", "target", "pins", "min_bits", "max_bits", "activations", "rotate", "rotation_block")
OF_COSTS = ("prove", "groups")
DEFAULT_KEEP = ("attention", "router", "shared_expert_gate", "lm_head")


@dataclass(frozen=True, kw_only=True)
class Method:
    """One method of planning.

    Attributes:
        name: as recipes say it.
        summary: what it does, after the name, in `aqtx ls methods`.
        options: keys of `assign_plan` that it reads beside those of its kind.
        needs: annotations that an earlier pass must have made.
        needs_text: it looks at calibration text.
        walks: own -> how `measure` goes through the model, and with how many sequences, None for all.
        measure: (program, wanted, own, context, seed) -> details for the report. Annotates what is lacking; errors by
            format are there already.
        cost: (sites, formats, own, seed) -> [sites, formats], from what the sites are annotated with.
        domains: (sites, formats, own) -> domain of the text -> costs of it alone, empty where there is one only.
        again: (program, wanted, own, context, plan) -> site -> costs of its wanted formats with the sites of a plan
            rounded; annotates nothing.
        in_nats: whether costs are nats per token, so that their sum foretells a loss.
        problems: (sites, own) -> what does not fit the sites to plan, as sentences; reads no weight.
        choose: (options, own, budget in bytes) -> a format index per site; the budget holds with pins and limits.
        budget: whether it must be given one, may be, or derives the size from its own keys.
        nominal: the budget counts every matrix once, at the bits of its elements.
        honours_groups: it can give all sites of a group one format.
        base: `search` may plan its candidates by it.
        candidates: the formats to choose from where the recipe names none.
        counts: how many candidates it can work with; empty for any number.
        keep: what stays as it is where the recipe does not say.
        arms: what a study compares: arm -> the keys that make it.
        slow_arms: those of the arms that a study leaves out unless asked.
    """

    name: str
    summary: str
    options: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    needs_text: bool = False
    walks: Callable[[Own], tuple[Walks, int | None]] = lambda own: ("matrices", None)
    measure: Measure | None = None
    cost: Cost | None = None
    domains: Domains | None = None
    again: Again | None = None
    in_nats: bool = False
    problems: Callable[[Sequence[Site], Own], list[str]] | None = None
    choose: Choose | None = None
    budget: Literal["required", "optional", "own"] = "required"
    nominal: bool = False
    honours_groups: bool = False
    base: bool = True
    candidates: tuple[str, ...] = STANDARD
    counts: tuple[int, ...] = ()
    keep: tuple[str, ...] = DEFAULT_KEEP
    arms: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    slow_arms: tuple[str, ...] = ()

    @property
    def keys(self) -> frozenset[str]:
        """All keys of `assign_plan` that it reads."""
        found = [*OF_ALL, *self.options]
        if self.cost is not None or self.choose is not None:
            found += OF_DECISIONS
            found += [] if self.budget == "own" else ["average_bits"]
            found += [] if self.budget == "own" or self.nominal else ["budget_bytes", "cost_model"]
        found += OF_COSTS if self.cost is not None else ["groups"] if self.honours_groups else []
        return frozenset(found)


METHODS: dict[str, Method] = {}


def register(method: Method) -> Method:
    """Put a method into the table; a second one of its name is refused, and so is one with both a cost and a rule."""
    if method.name in METHODS:
        raise ValueError(f"method {method.name!r} is registered twice")
    if method.cost is not None and method.choose is not None:
        raise ValueError(f"method {method.name!r} has a cost and a rule: give one of them")
    METHODS[method.name] = method
    return method


def arms() -> dict[str, dict[str, Any]]:
    """What a study can compare: arm -> the keys of `assign_plan` that make it."""
    rows = sorted(METHODS.items())
    return {name: {"method": row.name, **keys} for _, row in rows for name, keys in row.arms.items()}
