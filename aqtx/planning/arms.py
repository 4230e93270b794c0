"""What a study compares: the arms by name, the budgets, and how much time goes into trials."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from aqtx.errors import InputError, nearest
from aqtx.planning.settings import Settings

# arm -> the fields of `assign_plan` that make it; all others are the recipe's
ARMS: dict[str, dict[str, Any]] = {
    "alpha": {"method": "alpha"},
    "alpha_reversed": {"method": "alpha", "direction": "high_alpha_high_bits"},
    "alpha_strong": {"method": "alpha", "gamma": 2.0},
    "alpha_strong_reversed": {"method": "alpha", "gamma": 2.0, "direction": "high_alpha_high_bits"},
    "alpha_role": {"method": "alpha", "normalize": "category"},
    "alphaq": {"method": "alphaq"},
    "error": {"method": "error"},
    "hessian": {"method": "hessian"},
    "pmq": {"method": "pmq"},
    "fisher": {"method": "fisher", "fisher_detail": "direction"},
    "fisher_diagonal": {"method": "fisher", "fisher_detail": "element"},
    "fisher_matrix": {"method": "fisher", "fisher_detail": "matrix"},
    "trial": {"method": "trial"},
    "calibrated": {"method": "calibrated"},
    "uniform": {"method": "even"},  # two neighbouring formats, spread evenly, so that the bytes are equal
    "random": {"method": "random"},
}
# a trial of every matrix takes long
DEFAULT_ARMS = tuple(name for name in ARMS if name not in ("trial", "fisher_matrix"))


@dataclass(frozen=True, kw_only=True)
class StudySpec:
    """The recipe's `study` section.

    Fields:
        methods: arms to compare.
        reference: the arm that the others are compared with; null takes the recipe's own method.
        average_bits: budgets, in stored bits per planned weight.
        random_seeds: repetitions of the random arm.
        max_document: tokens of a document to score, so that there are many documents to resample; null takes all.
        trial_seconds: time for measuring single matrices, the truth that sensitivities are correlated with.
    """

    methods: tuple[str, ...] = DEFAULT_ARMS
    reference: str | None = None
    average_bits: tuple[float, ...] = (3.5, 4.5, 5.5)
    random_seeds: int = 5
    max_document: int | None = 512
    trial_seconds: float = 120.0

    def __post_init__(self) -> None:
        """Refuse unknown arms and empty lists, all at once."""
        names = [*self.methods, *([self.reference] if self.reference else [])]
        problems = [f"methods: unknown {name!r}{nearest(name, ARMS)}" for name in names if name not in ARMS]
        if not self.methods or not self.average_bits:
            problems.append("methods and average_bits: name at least one each")
        if self.random_seeds < 1 or self.trial_seconds < 0:
            problems.append("random_seeds must be at least 1, and trial_seconds not negative")
        if problems:
            raise InputError(*problems)

    def arms(self, base: Settings) -> list["Arm"]:
        """Every arm at every budget, repetitions included; the reference comes first."""
        reference = self.reference or arm_of(base)
        names = [reference, *(name for name in self.methods if name != reference)]
        return [
            Arm(name, bits, seed, replace(_plain(base), **ARMS[name], average_bits=bits, seed=seed))
            for bits in self.average_bits
            for name in names
            for seed in range(self.random_seeds if name == "random" else 1)
        ]


@dataclass(frozen=True)
class Arm:
    """One plan to try."""

    name: str
    bits: float
    seed: int
    settings: Settings

    @property
    def file_name(self) -> str:
        """A name for its scores."""
        return f"{self.name}-{self.bits:g}-{self.seed}"


def arm_of(base: Settings) -> str:
    """The arm that the recipe's own settings amount to; alpha where there is none."""
    keys = {key for fields in ARMS.values() for key in fields}
    own = {key: getattr(base, key) for key in keys}
    fitting = [name for name, fields in ARMS.items() if fields.items() <= own.items()]
    return max(fitting, key=lambda name: len(ARMS[name]), default="alpha")


def _plain(base: Settings) -> Settings:
    """The recipe's settings without what names a size or belongs to one method; a pass becomes plain settings."""
    names: Iterable[str] = Settings.__dataclass_fields__
    fields = {name: getattr(base, name) for name in names}
    return Settings(**{**fields, "budget_bytes": None, "plan": None, "activations": "none"})
