"""What commands beside `aqtx apply` write: a folder or file made as a whole, or files of theirs kept in a folder.

All go by the same rule: the place is locked while a command works on it, what is in the way is an error before anything
runs and again before something is replaced, and nothing is ever removed that our mark (`marker`) does not list.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from aqtx.errors import InputError
from aqtx.machine.files import writing
from aqtx.machine.marker import MARKER, foreign_files, mark, own_files, refuse_claim, run_of, some
from aqtx.machine.output_folder import OutputFolder


@contextmanager
def made_folder(output: Path, command: str, names: Iterable[str], *, replace: bool = True) -> Iterator[Path]:
    """Where to write a folder that appears under its name when all of it is there.

    Args:
        output: its name; absent, empty, or with `replace` what the same command wrote before.
        command: whose it is.
        names: files and patterns of what will be written.

    Raises:
        InputError: something is in the way. Where it came while the command ran, what was written stays beside it.
    """
    folder = OutputFolder(output)
    try:
        _refuse(folder, command, replace=replace)
        _begin(folder, command, names)
        with _given_up_on_failure(folder):
            yield folder.staging
            mark(folder.staging, command, [name for name in own_files(folder.staging) if name != MARKER])
        try:
            _refuse(folder, command, replace=replace)
            folder.publish(replace=replace and run_of(folder.output) == command)
        except InputError as error:
            raise InputError(*error.problems, f"what was written waits in {folder.staging}") from None
    finally:
        folder.release()


@contextmanager
def made_file(output: Path, command: str) -> Iterator[Path]:
    """Where to write a file that appears under its name when it is whole; one that is there is never replaced."""
    folder = OutputFolder(output)
    try:
        _refuse_file(folder.output)
        _begin(folder, command, [folder.output.name])
        staged = folder.staging / folder.output.name
        with _given_up_on_failure(folder):
            yield staged
        _refuse_file(folder.output, f"; what was written waits in {folder.staging}")
        with writing(folder.output):
            try:
                os.link(staged, folder.output)  # fails where somebody was faster
            except OSError:  # a file system without links
                staged.rename(folder.output)
        folder.clear_staging()
    finally:
        folder.release()


@contextmanager
def kept_folder(output: Path, names: Iterable[str]) -> Iterator[Path]:
    """A folder that a command adds its files to, locked; it is there when the first of them is claimed (`claim`).

    Raises:
        InputError: one of `names` is there already, and no command of ours wrote it.
    """
    folder = OutputFolder(output)
    try:
        refuse_claim(folder.output, names)
        yield folder.output
    finally:
        folder.release()


def _begin(folder: OutputFolder, command: str, names: Iterable[str]) -> None:
    folder.refuse_staging()
    folder.clear_staging()
    folder.open_staging(command, names)


@contextmanager
def _given_up_on_failure(folder: OutputFolder) -> Iterator[None]:
    try:
        yield
    except BaseException:
        with suppress(InputError):  # what others put there stays, with all the rest
            folder.clear_staging()
        raise


def _refuse(folder: OutputFolder, command: str, *, replace: bool) -> None:
    output = folder.output
    if output.exists() and not output.is_dir():
        raise InputError(f"the folder {output} cannot be made: it is a file")
    if not output.exists() or not any(output.iterdir()):
        return
    if not replace:
        raise InputError(f"{output}: the folder is not empty; name another one")
    if run_of(output) != command:
        found = some(foreign_files(output) or [name for name in own_files(output) if name != MARKER])
        raise InputError(f"{output} holds files that `aqtx {command}` did not write ({found}); name another folder")
    folder.refuse_foreign(output)


def _refuse_file(output: Path, more: str = "") -> None:
    if os.path.lexists(output):
        raise InputError(f"{output} exists; name another file{more}")
