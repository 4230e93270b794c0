"""Weights of a GGUF file that `aqtx export` wrote, by parameter name, decoded when asked for."""

import math
from pathlib import Path

import torch
from torch import Tensor

from aqtx.checkpoint.exports.gguf_metadata import family_of, names_of
from aqtx.checkpoint.exports.gguf_parts import Part, flat
from aqtx.checkpoint.exports.gguf_reader import GgufReader
from aqtx.checkpoint.exports.gguf_rules import parts_of
from aqtx.errors import InputError
from aqtx.program.names import is_stacked


class GgufSource:
    """A `Source` of a program; its folder, with config and tokenizer, is there as long as this object."""

    def __init__(self, file: Path) -> None:
        self.reader = GgufReader(file)
        self.config = self.reader.config
        self.dtype: torch.dtype = getattr(torch, str(self.config.get("dtype") or "bfloat16").removeprefix("torch."))
        self._scratch = self.reader.folder()
        self.folder = Path(self._scratch.name)
        self._family = family_of(self.config, file)
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._names = names_of(self._family.arch, self.config["num_hidden_layers"])

    def parameter(self, name: str) -> Tensor:
        """The whole parameter, experts stacked."""
        shape = self._shapes[name]
        if is_stacked(name, shape):
            return torch.stack([self.expert(name, index) for index in range(shape[0])])
        value = self.reader.parameter(self._places(name), flat(shape, stacked=False))
        return value.to(self.dtype).reshape(shape)

    def expert(self, name: str, index: int) -> Tensor:
        """One expert's matrix."""
        return self.reader.parameter(self._places(name), self._shapes[name][1:], index).to(self.dtype)

    def own_dtype(self, name: str) -> torch.dtype | None:
        """None: llama.cpp keeps vectors in float32 whatever the model's dtype, so the file's say nothing."""
        return None

    def _places(self, name: str) -> list[tuple[str, Part]]:
        """The tensors that hold a parameter, and what of it."""
        parts = parts_of(self._family.rules, self.config, name)
        found = [(f"{self._names.get_name(part.asked)}{part.suffix}", part) for part in parts]
        if not all(stored in self.reader.tensors for stored, _ in found):
            raise InputError(f"{self.reader.file}: no tensor holds {name}")
        return found

    def check(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Take the parameters' shapes; InputError where one is missing or of another size."""
        self._shapes = shapes
        for name, shape in shapes.items():
            places = self._places(name)
            if sum(int(self.reader.tensors[stored].n_elements) for stored, _ in places) != math.prod(shape):
                raise InputError(f"{self.reader.file}: {places[0][0]} is not of the shape {list(shape)} of {name}")
