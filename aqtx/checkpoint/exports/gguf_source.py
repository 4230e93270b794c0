"""Weights of a GGUF file that `aqtx export` wrote, by parameter name, decoded when asked for."""

import math
from pathlib import Path

import torch
from torch import Tensor

from aqtx.checkpoint.exports.gguf_metadata import family_of, names_of
from aqtx.checkpoint.exports.gguf_reader import GgufReader
from aqtx.errors import InputError


class GgufSource:
    """A `Source` of a program; its folder, with config and tokenizer, is there as long as this object."""

    def __init__(self, file: Path) -> None:
        self.reader = GgufReader(file)
        self.config = self.reader.config
        self.dtype: torch.dtype = getattr(torch, str(self.config.get("dtype") or "bfloat16").removeprefix("torch."))
        self._scratch = self.reader.folder()
        self.folder = Path(self._scratch.name)
        self._family = family_of(self.config, file)
        self._names = names_of(self._family.arch, self.config["num_hidden_layers"])

    def parameter(self, name: str) -> Tensor:
        """The whole parameter, experts stacked."""
        stored, heads = self._place(name)
        kind = self.reader.tensors[stored]
        if len(kind.shape) == 3:
            return torch.stack([self.expert(name, index) for index in range(int(kind.shape[-1]))])
        value = self.reader.decode(stored, None, heads)
        alone = value.dim() == 1 and name.endswith("shared_expert_gate.weight")  # a matrix of one row is a vector there
        return (value[None] if alone else value).to(self.dtype)

    def expert(self, name: str, index: int) -> Tensor:
        """One expert's matrix."""
        stored, heads = self._place(name)
        return self.reader.decode(stored, index, heads).to(self.dtype)

    def own_dtype(self, name: str) -> torch.dtype | None:
        """None: llama.cpp keeps vectors in float32 whatever the model's dtype, so the file's say nothing."""
        return None

    def _place(self, name: str) -> tuple[str, int]:
        """The tensor that holds a parameter, and its heads where its rows are in llama.cpp's order."""
        leaf = name.rpartition(".")[2]
        suffix = f".{leaf}" if leaf in ("weight", "bias") else ""
        found = self._names.get_name(name.removesuffix(suffix) if suffix else name)
        stored = f"{found}{suffix or '.weight'}"
        if found is None or stored not in self.reader.tensors:
            raise InputError(f"{self.reader.file}: no tensor holds {name}")
        heads = {"attn_q": self.config["num_attention_heads"]}
        heads["attn_k"] = self.config.get("num_key_value_heads") or heads["attn_q"]
        return stored, heads.get(stored.split(".")[-2], 0) if self._family.permuted else 0

    def check(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """InputError where a parameter is missing or of another size."""
        for name, shape in shapes.items():
            stored, _ = self._place(name)
            if int(self.reader.tensors[stored].n_elements) != math.prod(shape):
                raise InputError(f"{self.reader.file}: {stored} is not of the shape {list(shape)} of {name}")
