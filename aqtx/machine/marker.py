"""The mark of a folder that aqtx made, and the names of what was written into it.

Whatever removes or replaces files goes by this list: nothing that stands beside them is ever touched. A name is written
down before its file is. Names end with `*` in places where parts of a run choose their own (`work/codes/*.new`).
"""

import json
import os
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from aqtx.errors import InputError
from aqtx.machine.files import STAGED, make_folder, write_text

MARKER = ".aqtx-run"
_TOLD = 3  # foreign files that a sentence names


def mark(folder: Path, run: str, names: Iterable[str]) -> None:
    """Make a folder known as ours: `run` tells which run's it is, `names` are files and patterns, relative to it."""
    text = json.dumps({"written by": "aqtx", "run": run, "files": sorted(set(names))}, indent=1)
    write_text(folder / MARKER, text + "\n")


def is_marked(folder: Path) -> bool:
    """Whether a run of ours made the folder."""
    return _read(folder) is not None


def run_of(folder: Path) -> str:
    """Which run's the folder is; empty for one that is not ours."""
    return (_read(folder) or ("", []))[0]


def names_of(folder: Path) -> list[str]:
    """What the run wrote or may have written here; empty for a folder that is not ours."""
    return (_read(folder) or ("", []))[1]


def add_names(folder: Path, names: Iterable[str]) -> None:
    """Write down what is about to be written; of a folder that is not ours nothing is kept."""
    found = _read(folder)
    if found is not None and not set(names) <= set(found[1]):
        mark(folder, found[0], [*found[1], *names])


def drop_names(folder: Path, names: Iterable[str]) -> None:
    """Strike names off that no longer count."""
    found = _read(folder)
    if found is not None:
        mark(folder, found[0], set(found[1]) - set(names))


def claim(folder: Path, run: str, names: Iterable[str]) -> None:
    """Make a folder for files that a command writes, every time anew.

    Raises:
        InputError: one of them is there already, and no command of ours wrote it.
    """
    named = list(names)
    refuse_claim(folder, named)
    make_folder(folder)
    if is_marked(folder):
        add_names(folder, named)
    else:
        mark(folder, run, named)


def refuse_claim(folder: Path, names: Iterable[str]) -> None:
    """InputError where a file of these names is in a folder, and no command of ours wrote it."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"the folder {folder} cannot be made: it is a file")
    own = set(own_files(folder))
    if found := [name for name in names if name not in own and os.path.lexists(folder / name)]:
        raise InputError(f"{folder} holds {some(found)}, which would be replaced, and aqtx did not write it")


def _read(folder: Path) -> tuple[str, list[str]] | None:
    file = folder / MARKER
    try:
        told = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(told, dict) or told.get("written by") != "aqtx" or not isinstance(told.get("files"), list):
        return None
    return str(told.get("run")), [str(name) for name in told["files"]]


def files_below(folder: Path) -> list[str]:
    """Everything below a folder that is no folder, links included, by relative name; links are not followed."""
    found = []
    for root, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(root, name))]
        found += [Path(root, name).relative_to(folder).as_posix() for name in [*files, *links]]
    return sorted(found)


def own_files(folder: Path) -> list[str]:
    """The files of a folder that a run of ours wrote."""
    names = set(names_of(folder))
    patterns = [name for name in names if "*" in name]
    marks = (MARKER, MARKER + STAGED)

    def ours(name: str) -> bool:
        whole = name.removesuffix(STAGED)
        return name in marks or whole in names or any(fnmatchcase(name, pattern) for pattern in patterns)

    return [name for name in files_below(folder) if ours(name)]


def foreign_files(folder: Path) -> list[str]:
    """The files of a folder that no run of ours wrote."""
    own = {*own_files(folder), MARKER + STAGED}  # a run that was killed while it wrote its very first file
    return [name for name in files_below(folder) if name not in own]


def some(names: list[str]) -> str:
    """The first of many names, for a sentence."""
    more = len(names) - _TOLD
    return ", ".join(names[:_TOLD]) + (f" and {more} more" if more > 0 else "")


def remove_own(folder: Path, below: str = "") -> None:
    """Remove the files that a run wrote into a folder and the folders that this leaves empty; the mark goes last."""
    names = [name for name in own_files(folder) if name.startswith(below)]
    for name in sorted(names, key=lambda name: (name == MARKER, name)):
        (folder / name).unlink(missing_ok=True)
    parents = {parent for name in names for parent in Path(name).parents}
    for parent in sorted(parents, key=lambda path: -len(path.parts)):
        place = folder / parent
        if (parent != Path() or not below) and place.is_dir() and not any(place.iterdir()):
            place.rmdir()
