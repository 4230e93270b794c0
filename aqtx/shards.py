"""Write tensors as a sharded safetensors model with an index, byte for byte reproducible."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

MAX_SHARD_BYTES = 1_000_000_000


def write_shards(tensors: Iterable[tuple[str, Tensor]], directory: Path) -> None:
    """Write (key, tensor) pairs into `model-*.safetensors` and `model.safetensors.index.json`.

    A shard is written as soon as it is full, so that memory holds one shard at most.
    """
    shard: dict[str, Tensor] = {}
    places: dict[str, int] = {}
    number = size = total = 0
    for key, tensor in tensors:
        if shard and size + tensor.nbytes > MAX_SHARD_BYTES:
            number, size = _flush(shard, directory, number), 0
        shard[key] = tensor.detach().contiguous().cpu()
        places[key] = number
        size += tensor.nbytes
        total += tensor.nbytes
    count = _flush(shard, directory, number)
    names = [f"model-{index + 1:05d}-of-{count:05d}.safetensors" for index in range(count)]
    for index, name in enumerate(names):
        _staged(directory, index).rename(directory / name)
    index_json = {"metadata": {"total_size": total}, "weight_map": {key: names[at] for key, at in places.items()}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index_json, indent=1, sort_keys=True) + "\n")


def _staged(directory: Path, number: int) -> Path:
    return directory / f"shard-{number}.safetensors"


def _flush(shard: dict[str, Tensor], directory: Path, number: int) -> int:
    save_file(shard, _staged(directory, number), metadata={"format": "pt"})
    shard.clear()
    return number + 1


def sha256(file: Path) -> str:
    """Hex digest of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
