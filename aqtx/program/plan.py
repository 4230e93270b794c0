"""The plan: which site gets which format, what it costs, and why a site is left as it is."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from aqtx.errors import InputError
from aqtx.schema import parse_fields

_LISTED = 20  # problems that are told one by one


@dataclass(frozen=True, kw_only=True)
class PlanEntry:
    """What the plan says of one site. `format` is None for a kept site, and `why` tells the reason."""

    format: str | None
    activation: str | None = None
    rotation: int | None = None  # block of the Hadamard rotation before it
    category: str = "other"
    numel: int = 0
    bytes: int = 0  # as stored: codes, scales and zero points, or the kept matrix
    alpha: float | None = None
    error: float | None = None  # relative squared error of the chosen format
    cost: float | None = None  # what the method predicts to lose here
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Every site of a model with its format. `gap` 0 means that no plan of this method and budget costs less.

    `domains` tells of each domain of the text the predicted `loss`, that of its `own` best plan at the same bytes, and
    their ratio, the `regret`; `worst_domain`, where the plan was made for that, how near it is to the least regret.
    """

    sites: dict[str, PlanEntry]
    method: str
    budget: dict[str, float] = field(default_factory=dict)
    cost: float | None = None
    bound: float | None = None
    gap: float | None = None
    foretold: float | None = None  # nats per token in all, matrices added up, where the method's costs are such
    warnings: list[str] = field(default_factory=list)
    domains: dict[str, dict[str, float]] = field(default_factory=dict)
    worst_domain: dict[str, float] = field(default_factory=dict)

    @property
    def planned(self) -> dict[str, PlanEntry]:
        """The sites that the plan decides."""
        return {name: entry for name, entry in self.sites.items() if entry.format is not None}

    @property
    def average_bits(self) -> float | None:
        """Stored bits per weight over the planned sites; None where nothing is planned."""
        numel = sum(entry.numel for entry in self.planned.values())
        return sum(entry.bytes for entry in self.planned.values()) * 8 / numel if numel else None

    def to_json(self) -> dict[str, Any]:
        """What `plan.json` holds; keys of an entry that say nothing are left out."""
        facts: dict[str, Any] = {"method": self.method, "budget": self.budget, "average_bits": self.average_bits}
        facts |= {"cost": self.cost, "bound": self.bound, "gap": self.gap, "warnings": self.warnings}
        facts |= {} if self.foretold is None else {"foretold": self.foretold}
        facts |= {key: value for key in _BY_DOMAIN if (value := getattr(self, key))}
        return {**facts, "sites": {name: _entry_json(entry) for name, entry in self.sites.items()}}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Plan":
        """The plan that `to_json` told; keys that other versions wrote are passed over.

        Raises:
            InputError: an entry is missing or of another type; names every one.
        """
        told = {key: value for key, value in data.items() if key in cls.__dataclass_fields__}
        if isinstance(told.get("sites"), Mapping):
            told["sites"] = {name: _known(entry) for name, entry in told["sites"].items()}
        plan, problems = parse_fields(cls, told, "plan")
        if plan is None:
            raise InputError(
                *(problems[:_LISTED] + [f"and {len(problems) - _LISTED} more"] * (len(problems) > _LISTED))
            )
        return plan

    def check_sites(self, names: Iterable[str]) -> None:
        """Refuse a plan of another model: its sites must be these, and the first difference is named."""
        check_same_sites(list(self.sites), list(names))


def _known(entry: Any) -> Any:
    """An entry without the keys that other versions wrote."""
    if not isinstance(entry, Mapping):
        return entry
    return {key: value for key, value in entry.items() if key in PlanEntry.__dataclass_fields__}


_BY_DOMAIN = ("domains", "worst_domain")  # left out where the text has one domain


def _entry_json(entry: PlanEntry) -> dict[str, Any]:
    told = asdict(entry)
    return {"format": told.pop("format")} | {key: value for key, value in told.items() if value not in (None, "")}


def check_same_sites(planned: list[str], names: list[str]) -> None:
    """InputError that names the first site on which a plan and a model differ."""
    extra, missing = sorted(set(planned) - set(names)), sorted(set(names) - set(planned))
    if not extra and not missing:
        return
    first = min([*extra[:1], *missing[:1]], key=lambda name: (planned if name in extra else names).index(name))
    where = "the plan has it and the model has not" if first in extra else "the model has it and the plan has not"
    raise InputError(
        f"the plan is for another model: the first differing site is {first!r}, {where} "
        f"({len(extra)} sites only in the plan, {len(missing)} only in the model)"
    )
