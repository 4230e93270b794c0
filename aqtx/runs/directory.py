"""The output folder of a run: staged under a second name, complete or not there at all."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from aqtx.errors import InputError
from aqtx.machine.files import make_folder, sha256
from aqtx.runs.fingerprint import first_difference

_FINGERPRINT = "fingerprint.json"
CHECKSUMS = "checksums.json"


class RunDirectory:
    """Where a run writes. Files are made in `staging` and appear under `output` when all are there.

    `work` holds resume points; it goes away with success.
    """

    def __init__(self, output: Path, *, resume: bool = False, overwrite: bool = False) -> None:
        self.output = output
        self.staging = output.with_name(output.name + ".partial")
        self.work = self.staging / "work"
        self._refuse(resume, overwrite)
        if overwrite and not resume:
            shutil.rmtree(self.staging, ignore_errors=True)

    def _refuse(self, resume: bool, overwrite: bool) -> None:
        if self.output.exists() and not self.output.is_dir():
            raise InputError(f"output {self.output} is a file; name a folder")
        occupied = self.output.exists() and any(self.output.iterdir())
        if occupied and not overwrite and not (resume and (self.output / CHECKSUMS).exists()):
            raise InputError(
                f"output {self.output} holds files already; pass --overwrite to replace it or choose another output"
            )
        if occupied and overwrite and not (self.output / CHECKSUMS).exists():
            raise InputError(
                f"output {self.output} holds files but no finished run ({CHECKSUMS} is not there), and --overwrite "
                "replaces runs only; choose another output"
            )
        if self.staging.exists() and any(self.staging.iterdir()) and not self._is_run(self.staging):
            raise InputError(f"{self.staging} is where this run would work, but no run wrote it; choose another output")
        if self.staging.exists() and not (overwrite or resume):
            raise InputError(
                f"output {self.output} has an unfinished run beside it ({self.staging.name}); "
                "pass --resume or --overwrite"
            )

    @staticmethod
    def _is_run(staging: Path) -> bool:
        """Whether an unfinished run made the folder: it has its resume points, or all of its files."""
        return (staging / "work").is_dir() or (staging / CHECKSUMS).exists() or (staging / "config.json").exists()

    @property
    def complete(self) -> bool:
        """A finished run stands under the output name, and none that is to replace it was begun."""
        return (self.output / CHECKSUMS).exists() and not self.staging.exists()

    def begin(self, fingerprint: dict[str, Any]) -> None:
        """Open the staging folder, or check that an unfinished run was started from the same things."""
        file = self.work / _FINGERPRINT
        if file.exists():
            difference = first_difference(json.loads(file.read_text()), fingerprint)
            if difference:
                raise InputError(f"cannot resume {self.staging}: {difference}; start again with --overwrite")
            return
        make_folder(self.work)
        file.write_text(json.dumps(fingerprint, indent=1))

    def finish(self) -> None:
        """Write checksums, drop the resume points and rename into place; an old run goes last."""
        shutil.rmtree(self.work, ignore_errors=True)
        files = sorted(file for file in self.staging.rglob("*") if file.is_file())
        sums = {file.relative_to(self.staging).as_posix(): sha256(file) for file in files}
        (self.staging / CHECKSUMS).write_text(json.dumps(sums, indent=1) + "\n")
        if not self.output.exists():
            self.staging.rename(self.output)
            return
        aside = Path(tempfile.mkdtemp(prefix=f"{self.output.name}.replaced-", dir=self.output.parent))
        old = self.output.rename(aside / self.output.name)
        try:
            self.staging.rename(self.output)
        except BaseException:
            old.rename(self.output)
            aside.rmdir()
            raise
        shutil.rmtree(aside, ignore_errors=True)
