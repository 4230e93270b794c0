"""A GGUF file read as plain weights: what verification compares and `aqtx eval` runs.

Decodes by `gguf`'s own code, which knows nothing of this project's.
"""

import json
import tempfile
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from torch import Tensor

from aqtx.checkpoint.exports.gguf_parts import Part
from aqtx.errors import InputError, malformed
from aqtx.models.sanity import nonsense


class GgufReader:
    """Tensors of a file by name, decoded one matrix at a time."""

    def __init__(self, file: str | Path) -> None:
        self.file = Path(file)
        with malformed(f"{self.file} is no GGUF file"):
            self._reader = GGUFReader(self.file)
        self.tensors = {tensor.name: tensor for tensor in self._reader.tensors}

    def text(self, key: str) -> str:
        """A string of the metadata, empty where it is not there."""
        found = self._reader.fields.get(key)
        return "" if found is None else str(found.contents())

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json as `aqtx export` put it into the file."""
        if not self.text("aqtx.config"):
            raise InputError(
                f"{self.file} was not written by `aqtx export`: it holds no config to build the model from"
            )
        with malformed(f"{self.file}: its config cannot be read"):
            found: dict[str, Any] = dict(json.loads(self.text("aqtx.config")))
        if problems := nonsense(found):
            raise InputError(*(f"{self.file}: {problem}" for problem in problems))
        return found

    def folder(self) -> tempfile.TemporaryDirectory[str]:
        """A folder with config.json and tokenizer.json, for as long as the returned object lives."""
        scratch = tempfile.TemporaryDirectory(prefix="aqtx-gguf-")
        (Path(scratch.name) / "config.json").write_text(json.dumps(self.config))
        if tokenizer := self.text("tokenizer.huggingface.json"):
            (Path(scratch.name) / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
        return scratch

    def decode(self, name: str, index: int | None = None) -> np.ndarray:
        """float32 values of a tensor, or of one expert of a stack, as the file has them."""
        if name not in self.tensors:
            raise InputError(f"{self.file}: tensor {name} is missing")
        tensor = self.tensors[name]
        data = tensor.data if index is None else tensor.data[index]
        values = dequantize(np.ascontiguousarray(data), tensor.tensor_type).astype(np.float32, copy=False)
        outer = self.tensors.get(name.removesuffix(".weight") + ".scale")
        return values if outer is None else values * outer.data.reshape(-1)[index or 0]

    def parameter(self, places: list[tuple[str, Part]], shape: tuple[int, ...], index: int | None = None) -> Tensor:
        """A parameter of this shape, or one expert of it, put together from the tensors that hold its parts."""
        whole = np.empty(shape, np.float32)
        for name, part in places:
            part.put_back(self.decode(name, index).reshape(part.shape(shape)), whole)
        return torch.from_numpy(whole)
