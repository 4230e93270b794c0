"""Arms of a benchmark, one JSON file each: kept, never measured twice, shared by processes that run at once."""

import fcntl
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Measure = Callable[[], dict[str, Any]]


def measured(folder: Path, arms: Mapping[str, Measure]) -> dict[str, dict[str, Any]]:
    """Measure the arms that have no file in `folder` and that no other process is at; return all that are there.

    The same command started twice shares the work; the one that ends last has all arms.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: file_of(folder, name) for name in arms}
    for name, measure in arms.items():
        with _claimed(files[name].with_suffix(".lock")) as mine:
            if mine and not files[name].exists():
                staged = files[name].with_suffix(".new")
                staged.write_text(json.dumps(measure()))
                staged.rename(files[name])
    return {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}


def file_of(folder: Path, name: str) -> Path:
    """Where an arm lies once it is measured."""
    return folder / f"{re.sub(r'[^a-z0-9_.@]+', '-', name.lower())}.json"


@contextmanager
def _claimed(file: Path) -> Iterator[bool]:
    """Whether this process is alone with an arm; the system frees the lock of a process that dies."""
    with file.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
