"""Write tensors as a sharded safetensors model with an index: streamed, and byte for byte reproducible.

The format (https://github.com/huggingface/safetensors, "Format"): eight bytes of header length, a JSON
header, then the tensors without gaps. The header must know every offset, and the library therefore wants
all tensors of a file at once; here they are appended to one scratch file per element size as they come,
so that memory holds one tensor, and put behind the header when the shard is full. Larger elements come
first, which keeps every tensor aligned.
"""

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from aqtx.machine.files import writing

MAX_SHARD_BYTES = 2_000_000_000
_HEADER_ALIGNMENT = 8
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.float8_e5m2: "F8_E5M2",
}


def write_shards(
    tensors: Iterable[tuple[str, Tensor]], directory: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write (key, tensor) pairs into `model-*.safetensors` and `model.safetensors.index.json`.

    `metadata` goes into the header of the last shard; it may be filled while the tensors come.
    """
    staged: list[Path] = []
    places: dict[str, int] = {}
    shard, total = _Shard(directory), 0
    for key, tensor in tensors:
        if shard.num_bytes and shard.num_bytes + tensor.nbytes > MAX_SHARD_BYTES:
            staged.append(shard.finish(directory / f"shard-{len(staged)}"))
            shard = _Shard(directory)
        shard.append(key, tensor.detach())
        places[key] = len(staged)
        total += tensor.nbytes
    staged.append(shard.finish(directory / f"shard-{len(staged)}", metadata))
    names = [f"model-{index + 1:05d}-of-{len(staged):05d}.safetensors" for index in range(len(staged))]
    for file, name in zip(staged, names, strict=True):
        file.rename(directory / name)
    index = {"metadata": {"total_size": total}, "weight_map": {key: names[at] for key, at in places.items()}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1, sort_keys=True) + "\n")


class _Stored(NamedTuple):
    """What the header tells of a tensor. No tensor on meta: small ones that live long, allocated where large ones
    were freed, keep the heap from ever shrinking, and writing a model took the memory of a model.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int


class _Shard:
    """One file in the making."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.num_bytes = 0
        self._entries: dict[int, list[tuple[str, _Stored]]] = {}  # by element size

    def _scratch(self, size: int) -> Path:
        return self.directory / f"elements-{size}.scratch"

    def append(self, key: str, tensor: Tensor) -> None:
        """Write a tensor's bytes and remember its place."""
        size = tensor.element_size()
        place = self._scratch(size)
        with writing(place, tensor.nbytes), place.open("ab" if size in self._entries else "wb") as stream:
            tensor.contiguous().cpu().view(-1).view(torch.uint8).numpy().tofile(stream)
        self._entries.setdefault(size, []).append((key, _Stored(tensor.dtype, tuple(tensor.shape), tensor.nbytes)))
        self.num_bytes += tensor.nbytes

    def finish(self, file: Path, metadata: Mapping[str, str] | None = None) -> Path:
        """Header and data in one file; the scratch files go."""
        sizes = sorted(self._entries, reverse=True)
        header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
        at = 0
        for key, tensor in (entry for size in sizes for entry in self._entries[size]):
            offsets = [at, at + tensor.nbytes]
            header[key] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
            at += tensor.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _HEADER_ALIGNMENT)
        with writing(file, self.num_bytes), file.open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for size in sizes:
                with self._scratch(size).open("rb") as data:
                    shutil.copyfileobj(data, stream, 1 << 20)
                self._scratch(size).unlink()
        return file
