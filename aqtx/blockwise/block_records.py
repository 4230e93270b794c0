"""Finished blocks of a pass that takes long, so that a killed run goes on where it stopped.

A block's codes lie on disk already, one checksummed file each; a small record lists them once all are
there. Records are written under a second name and renamed, so a record is whole or absent, and it carries
its own checksum. What came before the first block without a record is not computed again.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aqtx.machine.files import read_record, write_record
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
        content = {"codes": {site: told[site] for site in sites}, "payload": payload}
        write_record(self._folder / f"block-{index}.json", content)

    def load(self, index: int) -> dict[str, Any] | None:
        """What `save` was given, its codes restored to the program; None where the block is not finished.

        Raises:
            InputError: the record or a file of codes is damaged; names it.
        """
        file = self._folder / f"block-{index}.json" if self.work is not None else None
        if file is None or self.work is None or not file.exists():
            return None
        found = read_record(file)
        self.program.codes.restore(found["codes"], self.work / CODES)
        payload: dict[str, Any] = found["payload"]
        return payload
