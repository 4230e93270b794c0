"""The packed results of rounding, by site: in memory, or one file each where a run may outgrow memory."""

from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from aqtx.errors import InputError
from aqtx.formats import QuantizedTensor
from aqtx.machine.files import sha256, writing


@dataclass(frozen=True)
class Spilled:
    """Codes that lie in a file."""

    file: Path
    format_name: str
    shape: tuple[int, ...]
    sha256: str


class CodeStore(MutableMapping[str, QuantizedTensor]):
    """Site name -> codes. After `spill_to`, what is set goes to disk and is read when asked for."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._codes: dict[str, QuantizedTensor | Spilled] = {}
        self._folder: Path | None = None

    def spill_to(self, folder: Path) -> None:
        """Keep codes under `folder` from now on."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder

    def __setitem__(self, site: str, code: QuantizedTensor) -> None:
        self._codes[site] = code if self._folder is None else self._write(site, code, self._folder)

    def __getitem__(self, site: str) -> QuantizedTensor:
        found = self._codes[site]
        return self._read(found) if isinstance(found, Spilled) else found

    def __delitem__(self, site: str) -> None:
        del self._codes[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self._codes)

    def __len__(self) -> int:
        return len(self._codes)

    def __contains__(self, site: object) -> bool:
        return site in self._codes

    def format_of(self, site: str) -> str | None:
        """The format of a site's codes without reading them, None where there are none."""
        found = self._codes.get(site)
        return None if found is None else found.format_name

    def _write(self, site: str, code: QuantizedTensor, folder: Path) -> Spilled:
        file = folder / f"{site}.safetensors"
        staged = file.with_suffix(".new")
        parts = {part: tensor.contiguous() for part, tensor in code.to_disk().items()}
        with writing(file, sum(part.nbytes for part in parts.values())):
            save_file(parts, staged)
            staged.rename(file)
        return Spilled(file, code.format_name, tuple(code.shape), sha256(file))

    def _read(self, spilled: Spilled) -> QuantizedTensor:
        return QuantizedTensor.from_disk(load_file(spilled.file), spilled.format_name, spilled.shape, self.dtype)

    def to_json(self) -> dict[str, list[Any]]:
        """What is needed to find the files again; only spilled codes can be told."""
        told = {site: code for site, code in self._codes.items() if isinstance(code, Spilled)}
        return {site: [code.file.name, code.format_name, list(code.shape), code.sha256] for site, code in told.items()}

    def restore(self, told: dict[str, list[Any]], folder: Path) -> None:
        """Take codes back from their files, whose checksums must agree.

        Raises:
            InputError: a file is missing or damaged; names it.
        """
        for site, (name, format_name, shape, digest) in told.items():
            file = folder / name
            if not file.exists() or sha256(file) != digest:
                raise InputError(
                    f"{file}: resume data is missing or damaged (its SHA-256 differs); start again with --overwrite"
                )
            self._codes[site] = Spilled(file, format_name, tuple(shape), digest)


CODES = "codes"  # folder of the program's spilled codes, below the work folder
