"""Tensors that a killed run goes on from: one file, whole or absent, that knows when a byte of it has changed."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from aqtx.machine.files import STAGED, writing


def save_tensors(file: Path, tensors: Mapping[str, Tensor], told: Any) -> None:
    """Write tensors and JSON data in place of what stood there.

    Raises:
        InputError: the disk is full, or the folder cannot be written.
    """
    stored = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    text = json.dumps(told)
    staged = file.with_name(file.name + STAGED)
    with writing(file, sum(value.nbytes for value in stored.values())):
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(stored, staged, metadata={"told": text, "sha256": _digest(stored, text)})
        staged.replace(file)


def load_tensors(file: Path) -> tuple[dict[str, Tensor], Any] | None:
    """What `save_tensors` was given, on the CPU; None where there is none, or where it was cut short or changed."""
    if not file.is_file():
        return None
    try:
        with safe_open(file, "pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in list(stored.keys())}
            told = stored.metadata()
        if told["sha256"] == _digest(tensors, told["told"]):
            return tensors, json.loads(told["told"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        pass  # the work is done again, to the same values
    return None


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    found = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        found.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}".encode())
        found.update(tensors[name].flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()
