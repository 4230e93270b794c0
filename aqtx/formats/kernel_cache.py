"""Where built libraries are kept, and which of them may be run: only whole ones that nobody else could have written.

A library is code, so one is loaded only if it and its folder belong to this user and nobody else can write them, and
if its size and digest are those that were written beside it. What is not so is built again; where the folder itself
cannot be trusted, in a private one that goes with the process.
"""

import atexit
import hashlib
import os
import shutil
import stat
import tempfile
from pathlib import Path

_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def cache_folder() -> Path:
    """`AQTX_CACHE_DIR`, or `aqtx` in the user's cache; made where it is missing, private where it cannot be trusted."""
    folder = _wanted()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
        if found.st_uid == os.getuid() and found.st_mode & _OTHERS:
            folder.chmod(stat.S_IMODE(found.st_mode) & ~_OTHERS)  # an older version, or a loose umask, made it
        if _is_own(folder) and os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass  # a read-only home, a file in the way: the private folder serves
    return _private()


def _wanted() -> Path:
    own, shared = os.environ.get("AQTX_CACHE_DIR"), os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own).absolute()
    base = Path(shared) if shared and Path(shared).is_absolute() else Path.home() / ".cache"
    return base / "aqtx"  # a relative XDG_CACHE_HOME does not count, as its standard says


def _private() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="aqtx-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def is_trusted(library: Path) -> bool:
    """Whether a library is this user's alone, and whole."""
    note = note_of(library)
    try:
        if not (_is_own(library) and _is_own(note) and _is_own(library.parent)):
            return False
        return note.read_text(encoding="ascii") == _told(library)
    except (OSError, ValueError):
        return False


def keep(made: Path, library: Path) -> None:
    """Move a library that was just built to its place, with its size and digest beside it."""
    made.chmod(0o700)
    note = note_of(made)
    note.write_text(_told(made), encoding="ascii")
    note.chmod(0o600)
    os.replace(made, library)  # whole or not at all, also with two builders at once
    os.replace(note, note_of(library))


def _is_own(path: Path) -> bool:
    found = path.lstat()
    return found.st_uid == os.getuid() and not stat.S_ISLNK(found.st_mode) and not found.st_mode & _OTHERS


def note_of(library: Path) -> Path:
    """The file with a library's size and digest."""
    return library.with_name(library.name + ".sha256")


def _told(library: Path) -> str:
    with library.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return f"{library.stat().st_size} {digest}\n"
