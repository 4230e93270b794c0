"""Read a Hugging Face folder of safetensors: shards, names, shapes; tensors stay memory-mapped.

Headers are read here rather than through the library, so that shapes, dtypes and truncation are
known before any tensor is touched. Pickled `.bin` files are refused: they can run code.
"""

import json
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from aqtx.errors import InputError
from aqtx.formats.decode import PARTS
from aqtx.program.names import NamesTable, Shape

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_LISTED = 20  # problems of one kind that are told one by one
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CONVERT = (
    "{folder} holds pickled weights ({name}), which can run code when they are read; convert them in a place you "
    'trust: python -c "from transformers import AutoModelForCausalLM as M; '
    "M.from_pretrained('{folder}').save_pretrained('{folder}-safetensors')\""
)


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies, and what it is, as the file's header says."""

    file: Path
    dtype: str  # safetensors' name: BF16, F32, U8, ...
    shape: Shape


class CheckpointReader:
    """All tensors of a checkpoint folder by key. Nothing is read until `get`."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.entries: dict[str, Entry] = {}
        for file, wanted in _shards(self.folder).items():
            header = read_header(file)
            lost = [] if wanted is None else sorted(wanted - header.keys())
            if lost:
                raise InputError(*_listed(lost, f"{INDEX} places {{}} in {file.name}, which does not hold it"))
            self.entries.update({key: header[key] for key in (header if wanted is None else wanted)})
        self._open: dict[Path, Any] = {}

    def __contains__(self, key: str) -> bool:
        return key in self.entries

    def shape(self, key: str) -> Shape:
        """A tensor's shape, from the header."""
        return self.entries[key].shape

    def get(self, key: str) -> Tensor:
        """A tensor, memory-mapped: never to be written to."""
        from safetensors import safe_open

        if key not in self.entries:
            raise InputError(f"{self.folder}: tensor {key} is missing")
        file = self.entries[key].file
        if file not in self._open:
            self._open[file] = safe_open(file, framework="pt")
        tensor: Tensor = self._open[file].get_tensor(key)
        return tensor

    def dtype(self) -> torch.dtype:
        """The dtype of most weights; of a quantized checkpoint the one that config.json declares."""
        if any(key.endswith(".qdata") for key in self.entries):
            config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
            declared = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
            dtype: torch.dtype = getattr(torch, declared.removeprefix("torch."))
            return dtype
        sizes: Counter[str] = Counter()
        for entry in self.entries.values():
            sizes[entry.dtype] += math.prod(entry.shape)
        floats = [name for name, _ in sizes.most_common() if name in _FLOATS]
        if not floats:
            raise InputError(f"{self.folder}: no tensor is of a floating-point dtype, found {', '.join(sizes)}")
        return _FLOATS[floats[0]]

    def check(
        self,
        shapes: Mapping[str, Shape],
        *,
        quantized: Iterable[str] = (),
        tied: Iterable[str] = (),
        left_out: Collection[str] = (),
    ) -> None:
        """Compare with a model's parameters and raise all differences at once.

        Args:
            shapes: parameter name -> shape, stacked experts as one parameter.
            quantized: keys, less `.weight`, that are stored as codes and scales.
            tied: parameters that share another one's storage; they may be on disk or not.
            left_out: keys of tensors that the model does without.
        """
        table, coded = NamesTable(shapes), {f"{site}.weight" for site in quantized}
        plain = [key for key in table.from_disk if key not in coded]
        wanted = set(plain) | {f"{key}.qdata" for key in coded}
        spare = {f"{key}.{part}" for key in coded for part in PARTS} | {*tied, *left_out}
        missing = sorted(wanted - self.entries.keys())
        extra = sorted(key for key in self.entries.keys() - wanted - spare if not _ignorable(key))
        wrong = [
            f"{self.folder}: {key} has shape {list(self.shape(key))}, config.json asks for {list(shape)}"
            for key in plain
            if key in self.entries and self.shape(key) != (shape := tuple(table.matrix_shape(key)))
        ]
        problems = _listed(missing, f"{self.folder}: tensor {{}} is missing")
        problems += _listed(extra, f"{self.folder}: tensor {{}} belongs to no parameter of the model")
        problems += wrong[:_LISTED] + ([f"and {len(wrong) - _LISTED} more"] if len(wrong) > _LISTED else [])
        if problems:
            raise InputError(*problems)


def read_header(file: Path) -> dict[str, Entry]:
    """Keys, dtypes and shapes of a safetensors file, whose length must be what its header says."""
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = int.from_bytes(prefix, "little")
        size = file.stat().st_size
        if len(prefix) < 8 or length > size - 8:
            raise InputError(f"{file} is truncated or no safetensors file")
        try:
            header = json.loads(stream.read(length))
        except ValueError:
            raise InputError(f"{file} is no safetensors file: its header is not JSON") from None
    header.pop("__metadata__", None)
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size != 8 + length + end:
        raise InputError(f"{file} is truncated: its header asks for {8 + length + end} bytes, the file has {size}")
    return {key: Entry(file, entry["dtype"], tuple(entry["shape"])) for key, entry in header.items()}


def _shards(folder: Path) -> dict[Path, set[str] | None]:
    """Files to read and the keys wanted of each, None for all."""
    if (folder / INDEX).is_file():
        try:
            places: dict[str, str] = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError) as error:
            raise InputError(f"{folder / INDEX} holds no weight_map: {error}") from None
        names = sorted(set(places.values()))
        leaving = [name for name in names if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts]
        if leaving:
            raise InputError(*(f"{folder / INDEX}: shard {name!r} lies outside the folder" for name in leaving))
        lost = [name for name in names if not (folder / name).is_file()]
        if lost:
            raise InputError(*(f"{folder}: shard {name} is missing" for name in lost))
        return {folder / name: {key for key, place in places.items() if place == name} for name in names}
    if (folder / SINGLE).is_file():
        return {folder / SINGLE: None}
    pickled = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
    if pickled:
        raise InputError(_CONVERT.format(folder=folder, name=pickled[0].name))
    raise InputError(f"{folder} holds neither {SINGLE} nor {INDEX}")


def _ignorable(key: str) -> bool:
    """Buffers that older checkpoints store and models compute for themselves."""
    return key.endswith(("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias"))


def _listed(keys: list[str], sentence: str) -> list[str]:
    """One sentence a key, the first ones only when there are many."""
    told = [sentence.format(key) for key in keys[:_LISTED]]
    return told + ([f"and {len(keys) - _LISTED} more of the same kind"] if len(keys) > _LISTED else [])
