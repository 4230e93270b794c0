"""The output folder of a run: staged under a second name, complete or not there at all."""

import json
import os
import warnings
from pathlib import Path
from types import TracebackType
from typing import Any

from aqtx.checkpoint.checks import CHECKSUMS
from aqtx.checkpoint.write import MODEL_FILES, write_checksums
from aqtx.errors import InputError
from aqtx.machine.files import make_folder, read_record, text_digest, write_record
from aqtx.machine.marker import MARKER, add_names, drop_names, files_below, is_marked, own_files, remove_own, some
from aqtx.machine.output_folder import OutputFolder, output_and_partial
from aqtx.runs.fingerprint import first_difference

_FINGERPRINT = "fingerprint.json"
_WORK = "work"
# What passes keep between them has names of their own choosing, but these kinds.
_WORK_FILES = tuple(f"{_WORK}/*.{kind}" for kind in ("safetensors", "json", "jsonl", "stream", "new"))
_FILES = ("samples/before.json", "samples/after.json", "recipe.yaml", "report.json", _FINGERPRINT, CHECKSUMS)


class RunDirectory:
    """Where a run writes. Files are made in `staging` and appear under `output` when all are there.

    `work` holds resume points; it goes away with success. The output is locked until `release`; ranks that do not lead
    write nothing that needs it.
    """

    def __init__(self, output: Path, *, resume: bool = False, overwrite: bool = False, leads: bool = True) -> None:
        self._replace, self._resume = overwrite, resume
        self._folder = OutputFolder(output) if leads else None
        self.output, self.staging = output_and_partial(output)
        if self._folder is not None:
            try:
                self._refuse(self._folder)
            except InputError:
                self.release()
                raise
        self.work = self.staging / _WORK

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()

    def release(self) -> None:
        """Let other runs work on the output."""
        if self._folder is not None:
            self._folder.release()

    def _refuse(self, folder: OutputFolder) -> None:
        """InputError for everything that stands in the way; a sentence on what stopped runs have left."""
        folder.refuse_staging()
        if not (self._resume and (self.complete or (folder.begun and is_marked(self.output)))):
            folder.refuse_output(replace=self._replace)
        for left in folder.leftovers():
            hint = "" if self.output.exists() else f"; `mv {left} {self.output}` puts it back"
            warnings.warn(
                f"{left} is what a run that was stopped was about to replace; remove it when it is not needed{hint}",
                stacklevel=2,
            )
        if not folder.begun:
            return
        if not (self._replace or self._resume):
            raise InputError(
                f"output {self.output} has an unfinished run beside it ({self.staging.name}); "
                "pass --resume or --overwrite"
            )
        if not self._resume:
            folder.refuse_foreign(self.staging)

    def refuse_source(self, source: Path | None) -> None:
        """InputError where the output is the folder that the model is read from, or the other way round."""
        taken = (self.output.resolve(), self.staging.resolve())
        if source is not None and any(source.resolve().is_relative_to(place) for place in taken):
            raise InputError(f"output {self.output} is where the model is read from; choose another output")

    @property
    def complete(self) -> bool:
        """A finished run stands under the output name, and none that is to replace it was begun."""
        finished = (self.output / CHECKSUMS).exists() and is_marked(self.output)
        return finished and not (self.staging.exists() and any(self.staging.iterdir()))

    def begin(self, fingerprint: dict[str, Any]) -> None:
        """Open the staging folder, or check that an unfinished run was started from the same things."""
        assert self._folder is not None
        if not self._resume:
            self._folder.clear_staging()
        file = self.work / _FINGERPRINT
        if file.exists():
            difference = first_difference(read_record(file), fingerprint)
            if difference:
                raise InputError(f"cannot resume {self.staging}: {difference}; start again with --overwrite")
            return
        run = text_digest(json.dumps(fingerprint, sort_keys=True))[:16]
        self._folder.open_staging(run, [*MODEL_FILES, *_WORK_FILES, *_FILES])
        make_folder(self.work)
        write_record(file, fingerprint)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What the finished run came from."""
        told: dict[str, Any] = read_record(self.output / _FINGERPRINT)
        return told

    def finish(self) -> None:
        """Write checksums, rename into place, and drop the resume points; an old run goes last."""
        assert self._folder is not None
        write_record(self.staging / _FINGERPRINT, read_record(self.work / _FINGERPRINT))
        stays = [name for name in own_files(self.staging) if not name.startswith((f"{_WORK}/", MARKER))]
        write_checksums(self.staging, stays)
        add_names(self.staging, _WORK_FILES)
        self._folder.publish(replace=self._replace or self._resume)
        self.clean()
        self.release()

    def clean(self) -> None:
        """Take resume points off a finished run, also those that a killed run did not come to."""
        work = self.output / _WORK
        if not work.is_dir():
            return
        remove_own(self.output, f"{_WORK}/")
        drop_names(self.output, _WORK_FILES)
        if left := files_below(work):
            warnings.warn(f"{work} keeps files that no run wrote: {some(left)}", stacklevel=2)
            return
        for root, _, _ in os.walk(work, topdown=False):
            os.rmdir(root)
