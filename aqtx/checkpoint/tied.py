"""Heads that config.json ties to the embedding while the file holds another one: they are read as their own.

transformers compares the two when both are in the file, and ties only what is equal.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_ROWS = 4096  # compared at once


def untied(
    config: dict[str, Any], model: nn.Module, stored: Callable[[str], Tensor | None], folder: Path
) -> dict[str, Any]:
    """The config as it is, or one that ties nothing, where a tied parameter has values of its own in the file.

    Args:
        config: of the model.
        model: made of it, on meta.
        stored: the value of a parameter in the file, None where it is not there.
        folder: for the warning.
    """
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        original = first.setdefault(id(parameter), name)
        if original == name:
            continue
        value, other = stored(name), stored(original)
        if value is not None and other is not None and not _equal(value, other):
            told = f"{folder}: config.json ties {name} to {original}, and the file holds another one"
            warnings.warn(f"{told}; it is read as its own", stacklevel=2)
            return {**config, "tie_word_embeddings": False}
    return config


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether two mapped matrices agree, a few rows at a time."""
    return one.shape == other.shape and all(
        torch.equal(a.float(), b.float()) for a, b in zip(one.split(_ROWS), other.split(_ROWS), strict=True)
    )
