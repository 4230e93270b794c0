"""What a pass is, and the table of all passes by their recipe names."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from aqtx.errors import InputError
from aqtx.machine.memory import room_for_work
from aqtx.machine.ranks import ALONE, Ranks
from aqtx.program.program import Program
from aqtx.program.site import Site

Item = TypeVar("Item")
Walks = Literal["matrices", "forward", "backward", "trials", "rounding", "training"]
Stage = Literal["annotate", "plan", "rotate", "round", "emit", "train", "other"]
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class OneOf:
    """Beside `str` in `Annotated`: the field holds a name of a table that grows as files are imported."""

    names: Callable[[], Iterable[str]]


@dataclass(frozen=True)
class Refusal:
    """A site that a pass left alone, and why, as a sentence."""

    site: str
    why: str


@dataclass
class Changes:
    """What a pass did: the sites it changed, those it refused, and data for the report."""

    changed: list[str] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Calibration:
    """Calibration sequences by domain.

    Attributes:
        ids: token ids [num_sequences, length].
        domains: the domain of each sequence; empty where all are of one.
        asked: domain -> what it weighs in a mean over domains; None where each weighs as many sequences as it has.
    """

    ids: Tensor
    domains: tuple[str, ...] = ()
    asked: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        """Refuse domains that do not fit the sequences, and weights that do not fit the domains."""
        if self.domains and len(self.domains) != len(self.ids):
            raise InputError(f"calibration: {len(self.ids)} sequences, but {len(self.domains)} names of domains")
        weights = self.asked or {}
        wrong = [name for name in dict.fromkeys(self.domains) if self.asked and not weights.get(name, 0) > 0]
        if wrong:
            raise InputError(f"calibration: domain {wrong[0]!r} has no weight above 0")

    @classmethod
    def mix(cls, parts: Mapping[str, tuple[Tensor, float]]) -> "Calibration":
        """Sequences [n, length] and a weight by domain, laid out so that any first ones are mixed like the whole."""
        places = [((row + 0.5) / len(ids), name, row) for name, (ids, _) in parts.items() for row in range(len(ids))]
        order = [(name, row) for _, name, row in sorted(places, key=lambda place: place[0])]
        ids = torch.stack([parts[name][0][row] for name, row in order])
        return cls(ids, tuple(name for name, _ in order), {name: weight for name, (_, weight) in parts.items()})

    def __getitem__(self, part: slice) -> "Calibration":
        """Some of the sequences."""
        return Calibration(self.ids[part], self.domains[part], self.asked)

    @property
    def weights(self) -> dict[str, float]:
        """Domain -> its share of the mean, of the domains that have sequences; the shares sum to 1."""
        counts = Counter(self.domains)
        given = counts if self.asked is None else {name: self.asked[name] for name in counts}
        return {name: weight / sum(given.values()) for name, weight in given.items()}

    def rows(self, domain: str) -> Tensor:
        """Which sequences are of a domain: bool [num_sequences]."""
        return torch.tensor([name == domain for name in self.domains], dtype=torch.bool)

    def shares(self) -> Tensor:
        """What each sequence counts in the mean: float64 [num_sequences], sum 1."""
        if self.asked is None or not self.domains:
            return torch.full((len(self.ids),), 1 / max(len(self.ids), 1), dtype=torch.float64)
        counts, weights = Counter(self.domains), self.weights
        return torch.tensor([weights[name] / counts[name] for name in self.domains], dtype=torch.float64)


@dataclass
class Context:
    """What the pipeline lends to a pass."""

    seed: int = 0
    device: torch.device = _CPU
    load_calibration: Callable[[], Tensor | Calibration] | None = None
    work: Path | None = None  # scratch folder, kept until the run is complete: resume points, spilled tensors
    quiet: bool = False
    ranks: Ranks = ALONE
    max_memory: int | None = None  # bytes that the whole process may take, None: what is free
    _calibration: Calibration | None = None

    def calibration(self) -> Tensor:
        """Token ids [num_sequences, length], read and tokenised once."""
        return self.by_domain().ids

    def by_domain(self) -> Calibration:
        """The same sequences with their domains."""
        if self._calibration is None:
            if self.load_calibration is None:
                raise InputError("a pass needs calibration text: give `calibration` in the recipe or to aqtx.run")
            found = self.load_calibration()
            self._calibration = found if isinstance(found, Calibration) else Calibration(found)
        return self._calibration

    def room(self) -> int:
        """Bytes that a pass may take beside what this process holds already; the smallest of all ranks' room."""
        return self.ranks.smallest(room_for_work(self.device, self.max_memory))

    def progress(self, items: Iterable[Item], *, total: int | None = None, description: str = "") -> Iterator[Item]:
        """Iterate with a progress bar that shows itself after two seconds and only on a terminal."""
        hidden = True if self.quiet else None
        yield from tqdm(items, total=total, desc=description, delay=2.0, disable=hidden, leave=False)


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One graph transform. A subclass's dataclass fields are its recipe keys, its defaults theirs.

    A pass answers three questions in order: which sites it finds, why it refuses one, and what
    it does to the rest. Set `exact` where the pass claims to keep the function: the pipeline
    then compares outputs on a probe batch at every run. `stage` says what kind of work it is, and
    `annotates` which annotations of sites (`aqtx.program.annotations`) it makes.
    """

    name: ClassVar[str]
    stage: ClassVar[Stage] = "other"
    annotates: ClassVar[tuple[str, ...]] = ()
    requires: ClassVar[tuple[str, ...]] = ()
    exact: ClassVar[bool] = False
    matrix_copies: ClassVar[int] = 8  # float32 copies of one matrix that it may hold at a time, as measured

    def walks(self) -> tuple[Walks, int | None]:
        """How the pass goes through the model, which decides its memory; and of how many sequences, None for all.

        Of training they are those of one step.
        """
        return "matrices", None

    def compiles(self, num_tokens: int) -> bool:
        """Whether the pass compiles a model that fits, for so many tokens of calibration text."""
        return False

    def validate(self) -> list[str]:
        """Problems of the pass's own field values, as sentences; no program is needed."""
        return []

    def misfits(self, program: Program) -> list[str]:
        """What does not fit the model, as sentences: asked of all passes before the first one runs; reads no weight."""
        return []

    def misplaced(self, before: Sequence["Pass"], after: Sequence["Pass"]) -> list[str]:
        """What its place among a recipe's passes leaves undone, as sentences: asked before a run; reads no model."""
        return []

    def find(self, program: Program) -> list[Site]:
        """The sites that the pass is about."""
        return program.sites()

    def refuse(self, program: Program, site: Site) -> str | None:
        """Why a site that was found is left alone, or None."""
        return None

    def apply(self, program: Program, sites: list[Site], context: Context) -> Changes:
        """Transform the program at the sites; plans fully before it mutates."""
        raise NotImplementedError

    def tables(self, program: Program) -> dict[str, str]:
        """Files that the pass adds to the output when the run is done, name -> text; reads the program as it ended."""
        return {}

    def run(self, program: Program, context: Context) -> Changes:
        """Find, refuse, apply."""
        found = self.find(program)
        refusals = [Refusal(site.name, why) for site in found if (why := self.refuse(program, site)) is not None]
        refused = {refusal.site for refusal in refusals}
        changes = self.apply(program, [site for site in found if site.name not in refused], context)
        changes.refused = refusals + changes.refused
        return changes


PASSES: dict[str, type[Pass]] = {}


def annotator(annotation: str) -> type[Pass] | None:
    """The first of the passes, by name, that makes an annotation; None where no loaded pass does."""
    return next((cls for _, cls in sorted(PASSES.items()) if annotation in cls.annotates), None)


PassType = TypeVar("PassType", bound=type[Pass])


def register(name: str) -> Callable[[PassType], PassType]:
    """Class decorator that puts a pass into the table; a second pass of one name is refused."""

    def add(cls: PassType) -> PassType:
        if name in PASSES:
            raise ValueError(f"pass {name!r} is registered twice: {PASSES[name].__module__} and {cls.__module__}")
        cls.name = name
        PASSES[name] = cls
        return cls

    return add
