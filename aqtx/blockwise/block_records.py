"""Finished blocks of a pass that takes long, so that a killed run goes on where it stopped.

A block's codes lie on disk already, one checksummed file each; a small record lists them once all are
there. Records are written under a second name and renamed, so a record is whole or absent, and it carries
its own checksum. What came before the first block without a record is not computed again.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aqtx.errors import InputError
from aqtx.program.codes import CODES
from aqtx.program.program import Program


@dataclass(frozen=True)
class BlockRecords:
    """Records of one pass under a work folder; without one nothing is kept."""

    program: Program
    work: Path | None
    name: str

    def __post_init__(self) -> None:
        """Codes go to disk from now on."""
        if self.work is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self.program.codes.spill_to(self.work / CODES)

    @property
    def _folder(self) -> Path:
        assert self.work is not None
        return self.work / self.name

    def save(self, index: int, sites: list[str], payload: dict[str, Any]) -> None:
        """A block is complete: its codes, and what the report will want to know of it."""
        if self.work is None:
            return
        told = self.program.codes.to_json()
        body = json.dumps({"codes": {site: told[site] for site in sites}, "payload": payload})
        staged = self._folder / f"block-{index}.new"
        staged.write_text(json.dumps({"sha256": _digest(body), "body": body}))
        staged.rename(staged.with_suffix(".json"))

    def load(self, index: int) -> dict[str, Any] | None:
        """What `save` was given, its codes restored to the program; None where the block is not finished.

        Raises:
            InputError: the record or a file of codes is damaged; names it.
        """
        file = self._folder / f"block-{index}.json" if self.work is not None else None
        if file is None or self.work is None or not file.exists():
            return None
        try:
            record = json.loads(file.read_text())
            body = record["body"]
            intact = record["sha256"] == _digest(body)
        except (ValueError, KeyError, TypeError, AttributeError):
            intact = False
        if not intact:
            raise InputError(f"{file}: resume data is damaged (its SHA-256 differs); start again with --overwrite")
        found = json.loads(body)
        self.program.codes.restore(found["codes"], self.work / CODES)
        payload: dict[str, Any] = found["payload"]
        return payload


def _digest(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()
