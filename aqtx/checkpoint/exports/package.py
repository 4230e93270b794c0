"""A checkpoint as an AOTInductor package: refuse, compile under a temporary name, run it once, rename."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from aqtx.checkpoint.open import open_program
from aqtx.errors import InputError
from aqtx.formats import kernel
from aqtx.machine.files import make_folder, writing
from aqtx.program.ahead_of_time import ENTRIES, compile_entry
from aqtx.program.cache_spec import of_graph
from aqtx.program.package import Package, open_package
from aqtx.program.program import Program

SUFFIX, KERNEL_SUFFIX = ".pt2", ".kernel.so"
_PROBE = (2, 8)  # sequences and tokens that the package and the model both compute
_ALLOWED = {
    torch.float32: 1e-3
}  # relative RMS difference of logits; of 16 bits a tenth, since roundings fall elsewhere


@dataclass(frozen=True, kw_only=True)
class Packaged:
    """What was written. `kernel` is the library to load before the package, None where it needs none.

    `difference` is that of its logits from the model's before compilation: RMS over RMS.
    """

    path: Path
    kernel: Path | None
    difference: float


def package(
    source: str | Path,
    output: str | Path,
    *,
    entry: str = "step",
    device: torch.device | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Packaged:
    """Compile an entry of a checkpoint into `output`, a new file named *.pt2, and its kernel library beside it.

    `say` is told when compiling begins.

    Raises:
        InputError: the place is taken, a file of the checkpoint is not what was written, or the model has no package.
    """
    place = Path(output)
    library = place.with_suffix(KERNEL_SUFFIX)
    _check_place(place, library, entry)
    program = open_program(source, None, check_files=True).to(device or torch.device("cpu"))
    make_folder(place.parent)
    say(f"compiling {source}; a large model takes minutes")
    staged = place.with_name(f"{place.stem}.partial{SUFFIX}")
    try:
        needs_kernel = compile_entry(program, entry, staged, {"model": Path(source).name})
        difference = check(program, open_package(staged))
        if needs_kernel:
            with writing(library):
                shutil.copyfile(kernel.library(), library)
        staged.rename(place)
    finally:
        staged.unlink(missing_ok=True)
    return Packaged(path=place, kernel=library if needs_kernel else None, difference=difference)


def check(program: Program, package: Package) -> float:
    """How far a package's logits are from those of the model that it was made from.

    Raises:
        InputError: so far that they compute different things.
    """
    ids = torch.randint(
        0, int(program.config.get("vocab_size", 2)), _PROBE, generator=torch.Generator().manual_seed(0)
    ).to(program.device)
    with torch.no_grad():
        if package.entry == "score":
            ours, theirs = program.module("score")(ids), package.score(ids)
        else:
            ours, theirs = (_stepped(step, ids, program) for step in (program.module("step"), package.step))
    error = (ours.double() - theirs.double()).square().mean().sqrt()
    difference = float(error / ours.double().square().mean().sqrt())
    if not difference <= _ALLOWED.get(program.dtype, 0.1):
        raise InputError(f"the compiled model's logits differ by {difference:.1%} from the model's, so it was not kept")
    return difference


def _stepped(step: object, ids: Tensor, program: Program) -> Tensor:
    """Logits of all but the last token at once, then of the last by itself."""
    assert callable(step)
    batch, length = ids.shape
    caches = [spec.make(batch, length, ids.device) for spec in of_graph(program.entry("step"))]
    start, places = torch.zeros(batch, dtype=torch.long, device=ids.device), torch.arange(length, device=ids.device)
    parts = [step(ids[:, at], places[at], start, caches) for at in (slice(length - 1), slice(length - 1, None))]
    return torch.cat(parts, dim=1)


def _check_place(place: Path, library: Path, entry: str) -> None:
    """Refuse what would be overwritten, and what is no name of a package."""
    if entry not in ENTRIES:
        raise InputError(f"no entry {entry!r} (known: {', '.join(ENTRIES)})")
    if place.suffix != SUFFIX:
        raise InputError(f"{place} must end in {SUFFIX}, which is what torch loads")
    for file in (place, library):
        if file.exists():
            raise InputError(f"{file} exists; name another file")
