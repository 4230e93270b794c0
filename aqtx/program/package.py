"""A package that `ahead_of_time` wrote, opened and run: no graph, no pass, no checkpoint.

A package is code. What it says of itself is read before any of it runs, but only a package that you or somebody you
trust made should be opened at all.
"""

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aqtx.errors import InputError, malformed
from aqtx.formats import kernel
from aqtx.program.cache_spec import CacheSpec, from_text

_TOLD = ".wrapper_metadata.json"
_NEEDED = ("aqtx", "torch", "entry", "device", "caches", "tokens", "positions")


@dataclass(frozen=True, kw_only=True)
class Package:
    """One compiled entry. `caches` is empty for `score`; `limits` are its tokens and positions, None without an end."""

    loader: Any  # torch's AOTIModelPackageLoader
    entry: str
    device: torch.device
    caches: list[CacheSpec]
    limits: tuple[int | None, int | None]

    def score(self, ids: Tensor) -> Tensor:
        """ids [B, S] -> logits [B, S, V]."""
        return self._run([ids.contiguous()])

    def step(self, ids: Tensor, pos: Tensor, start: Tensor, cache: list[Tensor]) -> Tensor:
        """ids [B, S], pos [S], start [B] and a cache, written in place -> logits [B, S, V]."""
        return self._run([ids.contiguous(), pos.contiguous(), start.contiguous(), *cache])

    def _run(self, inputs: list[Tensor]) -> Tensor:
        """Compiled code trusts that its inputs have the right dtype and are contiguous: it does not look."""
        # not through torch's wrapper, which parses two descriptions of its arguments at every call
        logits: Tensor = self.loader.run(inputs)[0]
        return logits


def open_package(file: Path) -> Package:
    """Load a package, and the compiled kernel that its code may call.

    Raises:
        InputError: the file is none that `aqtx package` wrote, or of another version of torch.
    """
    told = read_metadata(file)
    if told["torch"] != torch.__version__:
        raise InputError(
            f"{file} was made with torch {told['torch']}, and this is {torch.__version__}: package it again"
        )
    if told["device"] == "cuda" and not torch.cuda.is_available():
        raise InputError(f"{file} was made for a GPU, and torch sees none; package it with --device cpu")
    if told["device"] == "cpu":
        kernel.available()  # registers its ops
    with malformed(f"{file} is no whole package"):
        loader = torch._C._aoti.AOTIModelPackageLoader(str(file), "model", False, 1, -1)
        return Package(
            loader=loader,
            entry=told["entry"],
            device=torch.device(told["device"]),
            caches=from_text(told["caches"]),
            limits=(_count(told["tokens"]), _count(told["positions"])),
        )


def _count(word: str) -> int | None:
    return int(word) if word.isdecimal() else None


def read_metadata(file: Path) -> dict[str, str]:
    """What a package says of itself, without running any of it.

    Raises:
        InputError: the file is none that `aqtx package` wrote.
    """
    with malformed(f"{file} is no package that `aqtx package` wrote"):
        if not file.is_file():  # a named pipe would be waited for
            raise ValueError("it is no file")
        with zipfile.ZipFile(file) as archive:
            [name] = [name for name in archive.namelist() if name.endswith(_TOLD)]
            told: dict[str, str] = dict(json.loads(archive.read(name)))
    if missing := [key for key in _NEEDED if not isinstance(told.get(key), str)]:
        raise InputError(f"{file} is no package that `aqtx package` wrote: it does not tell {', '.join(missing)}")
    return told
