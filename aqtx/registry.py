"""What a pass is, and the table of all passes by their recipe names."""

from collections.abc import Callable, Iterable, Iterator, Sequence
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
Walks = Literal["matrices", "forward", "backward", "trials", "rounding", "resident"]
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


@dataclass
class Context:
    """What the pipeline lends to a pass."""

    seed: int = 0
    device: torch.device = _CPU
    load_calibration: Callable[[], Tensor] | None = None
    work: Path | None = None  # scratch folder, kept until the run is complete: resume points, spilled tensors
    quiet: bool = False
    ranks: Ranks = ALONE
    max_memory: int | None = None  # bytes that the whole process may take, None: what is free
    _calibration: Tensor | None = None

    def calibration(self) -> Tensor:
        """Token ids [num_sequences, length], read and tokenised once."""
        if self._calibration is None:
            if self.load_calibration is None:
                raise InputError("a pass needs calibration text: give `calibration` in the recipe or to aqtx.run")
            self._calibration = self.load_calibration()
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

    def walks(self) -> tuple[Walks, int | None]:
        """How the pass goes through the model, which decides its memory; and of how many sequences, None for all."""
        return "matrices", None

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
