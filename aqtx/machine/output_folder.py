"""A folder that appears under its name when it is complete, and never takes another's place unasked.

Files are made in `NAME.partial`, which carries our mark (`marker`). What is in the way is an error before anything is
made and again before the folder takes its name. A folder that is replaced moves aside first; of it, and of a partial
one that is given up, only files are removed that their own mark lists.
"""

import os
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path

from aqtx.errors import InputError
from aqtx.machine.files import make_folder
from aqtx.machine.lock import OutputLock
from aqtx.machine.marker import foreign_files, is_marked, mark, remove_own, some


class OutputFolder:
    """A name, and the partial folder beside it. Locked until `release`."""

    def __init__(self, output: Path) -> None:
        """Take the lock of the name, making the folders above it.

        Raises:
            InputError: the name cannot be that of a folder, or another process works on it.
        """
        self.output, self.staging = output_and_partial(output)
        self._made = [parent for parent in self.output.parents if not parent.exists()]  # deepest first
        make_folder(self.output.parent)
        try:
            self._lock = OutputLock(self.output)
        except InputError:
            self._remove_made()
            raise

    def release(self) -> None:
        """Let others work on the name; folders above it that came to nothing go."""
        self._lock.release()
        self._remove_made()

    def _remove_made(self) -> None:
        for parent in self._made:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()

    @property
    def begun(self) -> bool:
        """Whether an unfinished folder stands beside the name."""
        return self.staging.exists() and any(self.staging.iterdir())

    def refuse_staging(self) -> None:
        """InputError where something stands in the partial folder's place that is not ours."""
        if self.staging.is_symlink() or (self.staging.exists() and not self.staging.is_dir()):
            raise InputError(f"{self.staging} is where this run would work, and it is no folder; choose another output")
        if self.begun and not is_marked(self.staging) and foreign_files(self.staging):
            raise InputError(
                f"{self.staging} is where this run would work, but no run wrote it "
                f"({some(foreign_files(self.staging))}); choose another output"
            )

    def refuse_foreign(self, folder: Path) -> None:
        """InputError where a folder that is to go holds files that no run wrote."""
        if found := foreign_files(folder):
            raise InputError(
                f"{folder} holds files that no run wrote ({some(found)}), and nothing of yours is ever removed; "
                "move them away or choose another output"
            )

    def clear_staging(self) -> None:
        """Give up an unfinished folder of ours; one that holds anything else is an InputError."""
        if self.staging.exists():
            self.refuse_foreign(self.staging)
            remove_own(self.staging)

    def open_staging(self, run: str, names: Iterable[str]) -> None:
        """The partial folder with its mark; one that was begun keeps its own."""
        make_folder(self.staging)
        if not is_marked(self.staging):
            mark(self.staging, run, names)

    def refuse_output(self, *, replace: bool) -> None:
        """InputError where what stands under the name may not be replaced; an empty folder may always be."""
        if self.output.exists() and not self.output.is_dir():
            raise InputError(f"output {self.output} is a file; name a folder")
        if not self.output.exists() or not any(self.output.iterdir()):
            return
        if not replace and not is_marked(self.output):
            found = some(foreign_files(self.output))
            raise InputError(
                f"output {self.output} holds files already ({found}), and they are of no run that --overwrite could "
                "replace; choose another output"
            )
        if not replace:
            raise InputError(
                f"output {self.output} holds files already; pass --overwrite to replace it or choose another output"
            )
        if not is_marked(self.output):
            raise InputError(
                f"output {self.output} holds files but no finished run of ours, and --overwrite "
                "replaces runs only; choose another output"
            )
        self.refuse_foreign(self.output)

    def publish(self, *, replace: bool) -> None:
        """Let the partial folder take its name.

        Raises:
            InputError: something has come into the way meanwhile; the partial folder stays, whole.
        """
        try:
            self.refuse_output(replace=replace)
        except InputError as error:
            raise InputError(
                *error.problems,
                f"what was written waits in {self.staging}: when the way is free, the same command with "
                "--resume finishes it",
            ) from None
        if not self.output.exists() or not any(self.output.iterdir()):
            self.staging.rename(self.output)  # the system refuses a folder that is no longer empty
            return
        aside = Path(tempfile.mkdtemp(prefix=f"{self.output.name}.replaced-", dir=self.output.parent))
        os.rename(self.output, aside)
        try:
            self.staging.rename(self.output)
        except BaseException:
            os.rename(aside, self.output)
            raise
        remove_own(aside)
        if aside.exists():
            warnings.warn(f"{aside} keeps what no run wrote into the folder that was replaced", stacklevel=2)

    def leftovers(self) -> list[Path]:
        """Folders that runs which were stopped in the middle of a replacement have left behind."""
        start = f"{self.output.name}.replaced-"
        return sorted(path for path in self.output.parent.iterdir() if path.name.startswith(start))


def output_and_partial(output: Path) -> tuple[Path, Path]:
    """An output's own folder and the partial one beside it."""
    own = _own_name(output)
    return own, own.with_name(own.name + ".partial")


def output_beside(output: str | None, command: str) -> Path:
    """`OUTPUT.plan` of a recipe's output: where a command that is no run writes."""
    own = Path("out", command) if output is None else _own_name(Path(output))
    return own.with_name(f"{own.name}.{command}")


def _own_name(output: Path) -> Path:
    """The output with links resolved, if it can have a folder of its own.

    Raises:
        InputError: it is the current folder, the root, or no name that a file system takes.
    """
    try:
        os.lstat(output)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise InputError(f"output {str(output)!r} cannot be used: {getattr(error, 'strerror', error)}") from None
    if output.name in ("", "..") or output.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise InputError(
            f"output {str(output)!r} is the current folder or one above it; name a folder of the run's own"
        )
    return output.resolve() if output.is_symlink() else output
