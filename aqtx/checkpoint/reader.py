"""Read a Hugging Face folder of safetensors: shards, names, shapes; tensors stay memory-mapped.

Headers are read here rather than through the library, so that shapes, dtypes and truncation are
known before any tensor is touched. Pickled `.bin` files are refused: they can run code.
"""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from aqtx.checkpoint.checks import parts_of
from aqtx.checkpoint.header import Entry, read_header
from aqtx.checkpoint.locate import inside
from aqtx.errors import InputError
from aqtx.formats.decode import PARTS
from aqtx.formats.table import parse
from aqtx.machine.files import file_state, read_json
from aqtx.program.names import NamesTable, Shape

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
LISTED = 20  # problems of one kind that are told one by one
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _FLOATS.values()}
_CONVERT = (
    "{folder} holds pickled weights ({name}), which can run code when they are read; convert them in a place you "
    'trust: python -c "from transformers import AutoModelForCausalLM as M; '
    "M.from_pretrained('{folder}').save_pretrained('{folder}-safetensors')\""
)


def declared_dtype(config: Any, folder: Path) -> torch.dtype:
    """The dtype that config.json names, bfloat16 where it names none."""
    found = (config.get("dtype") or config.get("torch_dtype")) if isinstance(config, dict) else None
    dtype = DTYPES.get(str(found or "bfloat16").removeprefix("torch."))
    if dtype is None:
        raise InputError(f"{folder / 'config.json'}: dtype {found!r:.80} is none of {', '.join(DTYPES)}")
    return dtype


class CheckpointReader:
    """All tensors of a checkpoint folder by key. Nothing is read until `get`."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.entries: dict[str, Entry] = {}
        self._states: dict[Path, tuple[int, int, int] | None] = {}  # of the files, when their headers were read
        for file, wanted in _shards(self.folder).items():
            self._states[file] = file_state(inside(self.folder, file))
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
        if file_state(file) != self._states[file]:  # a mapped file that was cut short would end the process
            raise InputError(f"{file} was changed while it was being read; restore it, or start again")
        if file not in self._open:
            self._open[file] = safe_open(file, framework="pt")
        tensor: Tensor = self._open[file].get_tensor(key)
        return tensor

    def part(self, key: str, parts: tuple[range, ...]) -> Tensor:
        """A part of a tensor, one range a dimension: a view of the mapped file."""
        return self.get(key)[tuple(slice(part.start, part.stop, part.step) for part in parts)]

    def own_dtype(self, key: str) -> torch.dtype | None:
        """The floating-point dtype that a tensor is stored in, None for any other."""
        return _FLOATS.get(self.entries[key].dtype)

    @property
    def found(self) -> str | None:
        """What is packed in a way that is not ours, in words; None where nothing is."""
        return None

    def dtype(self) -> torch.dtype:
        """The dtype of most weights; of a quantized checkpoint the one that config.json declares."""
        if any(key.endswith(".qdata") for key in self.entries):
            return declared_dtype(read_json(self.folder / "config.json"), self.folder)
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
        quantized: Mapping[str, str] = MappingProxyType({}),
        tied: Iterable[str] = (),
        left_out: Collection[str] = (),
    ) -> None:
        """Compare with a model's parameters and raise all differences at once.

        Args:
            shapes: parameter name -> shape, stacked experts as one parameter.
            quantized: key, less `.weight`, of a matrix that is stored as codes and scales -> its format.
            tied: parameters that share another one's storage; they may be on disk or not.
            left_out: keys of tensors that the model does without.
        """
        table, coded = NamesTable(shapes), {f"{site}.weight": name for site, name in quantized.items()}
        plain = [key for key in table.from_disk if key not in coded]
        wanted = set(plain) | {f"{key}.qdata" for key in coded}
        spare = {f"{key}.{part}" for key in coded for part in PARTS} | {*tied, *left_out}
        missing = sorted(wanted - self.entries.keys())
        extra = sorted(key for key in self.entries.keys() - wanted - spare if not ignorable(key))
        wrong = [
            f"{self.folder}: {key} has shape {list(self.shape(key))}, config.json asks for {list(shape)}"
            for key in plain
            if key in self.entries and self.shape(key) != (shape := tuple(table.matrix_shape(key)))
        ]
        wrong += self.no_floats(plain)
        problems = _listed(missing, f"{self.folder}: tensor {{}} is missing")
        problems += _listed(extra, f"{self.folder}: tensor {{}} belongs to no parameter of the model")
        for key, name in coded.items():
            known = key in table.from_disk and len(table.matrix_shape(key)) == 2
            wrong += (
                self.part_problems(key, name, tuple(table.matrix_shape(key)))
                if known
                else [f"{self.folder}: config.json gives the format {name} to {key}, which is no matrix of the model"]
            )
        problems += wrong[:LISTED] + ([f"and {len(wrong) - LISTED} more"] if len(wrong) > LISTED else [])
        if problems:
            raise InputError(*problems)

    def no_floats(self, keys: Iterable[str]) -> list[str]:
        """A sentence for each weight that is stored as whole numbers or codes, of which nothing says what they mean."""
        return [
            f"{self.folder}: {key} is stored as {entry.dtype}, and a weight must be one of {', '.join(_FLOATS)}"
            for key in keys
            if (entry := self.entries.get(key)) is not None and entry.dtype not in _FLOATS
        ]

    def part_problems(self, key: str, format_name: str, shape: Shape) -> list[str]:
        """What is wrong with the parts of a packed matrix [N, K], as headers tell it: a sentence each."""
        try:
            wanted = parts_of(parse(format_name), shape)
        except InputError as error:
            return [f"{self.folder / 'config.json'}: {key}: {problem}" for problem in error.problems]
        problems = []
        for part in PARTS:
            entry = self.entries.get(f"{key}.{part}")
            if entry is None and part in wanted:
                problems.append(f"{self.folder}: tensor {key}.{part} is missing, and {format_name} has it")
            elif entry is not None and part not in wanted:
                problems.append(f"{self.folder}: tensor {key}.{part} is there, and {format_name} has no such part")
            elif entry is not None and (entry.dtype, entry.shape) != wanted[part]:
                dtype, size = wanted[part]
                problems.append(
                    f"{self.folder}: {key}.{part} is {entry.dtype} {list(entry.shape)}, "
                    f"{format_name} of {list(shape)} has {dtype} {list(size)}"
                )
        return problems


def _shards(folder: Path) -> dict[Path, set[str] | None]:
    """Files to read and the keys wanted of each, None for all."""
    if (folder / INDEX).is_file():
        places = _weight_map(folder / INDEX)
        names = sorted(set(places.values()))
        leaving = [name for name in names if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts]
        if leaving:
            raise InputError(*(f"{folder / INDEX}: shard {name!r} lies outside the folder" for name in leaving))
        lost = [name for name in names if not _is_file(folder / name)]
        if lost:
            raise InputError(*(f"{folder}: shard {name} is missing" for name in lost))
        return {folder / name: {key for key, place in places.items() if place == name} for name in names}
    if (folder / SINGLE).is_file():
        return {folder / SINGLE: None}
    pickled = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
    if pickled:
        raise InputError(_CONVERT.format(folder=folder, name=pickled[0].name))
    raise InputError(f"{folder} holds neither {SINGLE} nor {INDEX}")


def _weight_map(file: Path) -> dict[str, str]:
    """Key -> shard, of an index."""
    index = read_json(file)
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not places:
        raise InputError(f"{file} holds no weight_map: an object that maps each tensor to its file")
    wrong = [key for key, name in places.items() if not isinstance(name, str) or not name]
    if wrong:
        raise InputError(f"{file}: the file of tensor {wrong[0]} must be a name, not {places[wrong[0]]!r:.80}")
    return places


def _is_file(file: Path) -> bool:
    try:
        return file.is_file()
    except (OSError, ValueError):  # no name that a file system takes
        return False


def ignorable(key: str) -> bool:
    """Buffers that older checkpoints store and models compute for themselves."""
    return key.endswith(("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias"))


def _listed(keys: list[str], sentence: str) -> list[str]:
    """One sentence a key, the first ones only when there are many."""
    told = [sentence.format(key) for key in keys[:LISTED]]
    return told + ([f"and {len(keys) - LISTED} more of the same kind"] if len(keys) > LISTED else [])
