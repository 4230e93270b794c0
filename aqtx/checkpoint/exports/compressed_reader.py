"""A compressed-tensors folder read as plain weights: what verification compares and `aqtx eval` runs.

Decodes from the definition (a row is one little-endian bit string), by other steps than those that wrote it.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aqtx.checkpoint.header import Entry
from aqtx.checkpoint.reader import CheckpointReader
from aqtx.errors import InputError
from aqtx.formats.elements import code_to_value
from aqtx.formats.scales import decode_e8m0
from aqtx.formats.table import Element, parse

_SUFFIXES = ("_packed", "_scale", "_shape", "_zero_point", "_global_scale")
_ELEMENTS: dict[tuple[str, int], Element] = {
    ("float", 4): parse("mxfp4").element,
    ("float", 6): parse("mxfp6_e2m3").element,
}


def packed_name(key: str) -> str:
    """Where the codes of a weight lie."""
    return f"{key}_packed"


def is_compressed(config: dict[str, Any]) -> bool:
    """Whether a config.json is of a compressed-tensors folder."""
    found = config.get("quantization_config")
    return isinstance(found, dict) and found.get("quant_method") == "compressed-tensors"


class CompressedReader(CheckpointReader):
    """`CheckpointReader` of the decoded weights: `<site>.weight` in the model's dtype, and what was never quantized."""

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder)
        config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        self._dtype: torch.dtype = getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or "bfloat16"))
        self._schemes = list(config.get("quantization_config", {}).get("config_groups", {}).values())
        self._files = CheckpointReader(folder)
        self._stored = self._files.entries
        parts = {key for key in self._stored for suffix in _SUFFIXES if key.endswith(f".weight{suffix}")}
        coded = {re.sub(rf"({'|'.join(_SUFFIXES)})$", "", key) for key in parts}
        name = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}[self._dtype]
        plain = {key: entry for key, entry in self._stored.items() if key not in parts and key not in coded}
        self._coded = {key: self._scheme(key) for key in sorted(coded)}
        self.entries = plain | {
            key: Entry(self._any(key).file, name, (self._any(key).shape[0], self._columns(key))) for key in self._coded
        }

    def dtype(self) -> torch.dtype:
        """The dtype that config.json declares."""
        return self._dtype

    def get(self, key: str) -> Tensor:
        """A weight as the model computes with it."""
        return self.decode(key).to(self._dtype) if key in self._coded else self._files.get(key)

    def decode(self, key: str) -> Tensor:
        """The float32 values [N, K] of a quantized weight."""
        weights = self._coded[key]
        bits, is_float = weights["num_bits"], weights["type"] == "float"
        scale = self._files.get(f"{key}_scale")
        scale = decode_e8m0(scale) if scale.dtype == torch.uint8 else scale.float()
        if f"{key}_global_scale" in self._stored:
            outer = self._files.get(f"{key}_global_scale").double().reciprocal().float()
            scale = scale * outer
        if packed_name(key) not in self._stored:
            values = self._files.get(key).float()
        else:
            codes = _codes(self._files.get(packed_name(key)), bits, self._columns(key))
            values = code_to_value(codes, _ELEMENTS["float", bits]) if is_float else codes.float() - self._zero(key)
        blocks = values.unflatten(-1, (scale.shape[-1], -1))
        return (blocks * scale.unsqueeze(-1)).flatten(-2)

    def _zero(self, key: str) -> Tensor | float:
        """Zero points spread over the columns, or the middle of the range."""
        bits, stored = self._coded[key]["num_bits"], f"{key}_zero_point"
        if stored not in self._stored:
            return float(2 ** (bits - 1))
        rows = self._stored[packed_name(key)].shape[0]
        zero = _codes(self._files.get(stored).t().contiguous(), bits, rows).t().float()
        return zero.repeat_interleave(self._columns(key) // zero.shape[-1], -1)

    def _any(self, key: str) -> Entry:
        return self._stored.get(key) or self._stored[packed_name(key)]

    def _columns(self, key: str) -> int:
        """K, from the scales and the group, or from the bytes of codes that fill their rows."""
        if key in self._stored:
            return self._stored[key].shape[1]
        weights, (_, blocks) = self._coded[key], self._stored[f"{key}_scale"].shape
        if weights["strategy"] != "channel":
            return int(blocks * weights["group_size"])
        return int(self._files.get(f"{key}_shape")[1])

    def _scheme(self, key: str) -> dict[str, Any]:
        """The `weights` entry of the group whose targets match the module."""
        module = key.removesuffix(".weight")
        for group in self._schemes:
            for target in group["targets"]:
                if target == module or (target.startswith("re:") and re.match(target[3:], module)):
                    found: dict[str, Any] = group["weights"]
                    return found
        raise InputError(f"{self.folder}: no group of config.json's quantization_config matches {module}")


def _codes(packed: Tensor, bits: int, count: int) -> Tensor:
    """Codes [N, count] of rows that are little-endian bit strings, in bytes or int32 words."""
    data = torch.nn.functional.pad(packed.contiguous().view(torch.uint8), (0, 1)).int()
    at = torch.arange(count) * bits
    pair = data[:, at // 8] | (data[:, at // 8 + 1] << 8)
    return (pair >> (at % 8)) & (2**bits - 1)
