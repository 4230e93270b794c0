"""Tensors laid aside by key while a model is walked block by block: in memory, or one file each, mapped when read."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


@dataclass
class Shelf:
    """Groups of named tensors; with a folder they take disk instead of memory, a file each: writing one copies it."""

    folder: Path | None = None
    _held: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """The folder is made."""
        self._names: dict[str, list[str]] = {}
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Lay aside a group, in place of the one that had its key."""
        if self.folder is None:
            self._held[key] = {name: value.detach().cpu() for name, value in tensors.items()}
            return
        for name in set(self._names.get(key, ())) - tensors.keys():
            self._file(key, name).unlink()
        self._names[key] = list(tensors)
        for name, value in tensors.items():
            staged = self._file(key, name).with_suffix(".new")
            save_file({name: value.detach().cpu().contiguous()}, staged)
            staged.rename(self._file(key, name))  # what is mapped keeps its old file until it is let go

    def get(self, key: str, device: torch.device) -> dict[str, Tensor]:
        """A group, on the device; of files on a CPU only the pages that are used take memory."""
        if self.folder is None:
            found = self._held[key]
        else:
            found = {name: load_file(self._file(key, name))[name] for name in self._names[key]}
        return {name: value.to(device) for name, value in found.items()}

    def drop(self, key: str) -> None:
        """Let a group go."""
        if self.folder is None:
            del self._held[key]
            return
        for name in self._names.pop(key):
            self._file(key, name).unlink()

    def _file(self, key: str, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{key}-{name}.safetensors"
