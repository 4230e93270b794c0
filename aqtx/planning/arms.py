"""What a study compares: the arms by name, the budgets, and how much time goes into trials."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from aqtx.errors import InputError, nearest
from aqtx.planning.method import METHODS, arms
from aqtx.planning.settings import Settings

# without the arms that take long, such as a trial of every matrix
DEFAULT_ARMS = tuple(name for row in METHODS.values() for name in row.arms if name not in row.slow_arms)


@dataclass(frozen=True, kw_only=True)
class StudySpec:
    """The recipe's `study` section.

    Fields:
        methods: arms to compare.
        reference: the arm that the others are compared with; null takes the recipe's own method.
        average_bits: budgets, in stored bits per planned weight.
        random_seeds: repetitions of the random arm.
        max_document: tokens of a document to score, so that there are many documents to resample; null takes all.
        domains: also measure, for each domain of the text, what the plans of `fisher` lose over those of its own.
        trial_seconds: time for measuring single matrices, the truth that sensitivities are correlated with.
    """

    methods: tuple[str, ...] = DEFAULT_ARMS
    reference: str | None = None
    average_bits: tuple[float, ...] = (3.5, 4.5, 5.5)
    random_seeds: int = 5
    max_document: int | None = 512
    domains: bool = False
    trial_seconds: float = 120.0

    def __post_init__(self) -> None:
        """Refuse unknown arms and empty lists, all at once."""
        known = arms()
        names = [*self.methods, *([self.reference] if self.reference else [])]
        problems = [f"methods: unknown {name!r}{nearest(name, known)}" for name in names if name not in known]
        if not self.methods or not self.average_bits:
            problems.append("methods and average_bits: name at least one each")
        if self.random_seeds < 1 or self.trial_seconds < 0:
            problems.append("random_seeds must be at least 1, and trial_seconds not negative")
        if problems:
            raise InputError(*problems)

    def keys(self, base: Settings) -> set[str]:
        """The keys of `assign_plan` that the study reads: those of its arms, and for its trials of single matrices."""
        return {"trial_sequences"}.union(*(arm.settings.row.keys for arm in self.arms(base)))

    def arms(self, base: Settings) -> list["Arm"]:
        """Every arm at every budget, repetitions included; the reference comes first."""
        reference = self.reference or arm_of(base)
        made = arms()
        names = [reference, *(name for name in self.methods if name != reference)]
        return [
            Arm(name, bits, seed, replace(_plain(base), **made[name], average_bits=bits, seed=seed))
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
    made = arms()
    own = {key: getattr(base, key) for keys in made.values() for key in keys}
    fitting = [name for name, keys in made.items() if keys.items() <= own.items()]
    return max(fitting, key=lambda name: len(made[name]), default="alpha")


def _plain(base: Settings) -> Settings:
    """The recipe's settings without what names a size or belongs to one method; a pass becomes plain settings."""
    names: Iterable[str] = Settings.__dataclass_fields__
    fields = {name: getattr(base, name) for name in names}
    plain = {"budget_bytes": None, "plan": None, "prior": None, "activations": "none", "objective": "mean", "rounds": 1}
    return Settings(**{**fields, **plain})
