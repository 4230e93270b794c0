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

from aqtx.errors import InputError, malformed
from aqtx.models.sanity import nonsense


def rows_in_order(rows: np.ndarray, heads: int, *, back: bool = False) -> np.ndarray:
    """Rows of q or k as llama.cpp's rotary op pairs them, neighbours instead of halves; 0 heads leaves them."""
    if not heads:
        return rows
    half = rows.shape[0] // heads // 2
    first, second = (half, 2) if back else (2, half)
    return rows.reshape(heads, first, second, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


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

    def decode(self, name: str, index: int | None = None, heads: int = 0) -> Tensor:
        """float32 values of a tensor, or of one expert of a stack, rows in the order of the checkpoint."""
        if name not in self.tensors:
            raise InputError(f"{self.file}: tensor {name} is missing")
        tensor = self.tensors[name]
        data = tensor.data if index is None else tensor.data[index]
        values = dequantize(np.ascontiguousarray(data), tensor.tensor_type).astype(np.float32, copy=False)
        outer = self.tensors.get(name.removesuffix(".weight") + ".scale")
        if outer is not None:
            values = values * outer.data.reshape(-1)[index or 0]
        ordered = rows_in_order(values, heads, back=True)
        return torch.from_numpy(np.array(ordered))
