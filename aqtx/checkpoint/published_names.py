"""Tensors put together as a family's published checkpoints have them, for tools that know no other form."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from aqtx.models.on_disk import place


def as_published(config: Mapping[str, Any], tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """(key on disk, tensor), where one tensor holds the experts of a layer; a layer's experts are in memory at most."""
    wholes: dict[str, Tensor] = {}
    missing: dict[str, int] = {}
    for name, value in tensors:
        at = place(config, name)
        if at is None:
            yield name, value
            continue
        if at.key not in wholes:
            experts = int(config["num_local_experts"])
            wholes[at.key] = torch.empty(at.rule.whole_shape(experts, tuple(value.shape)), dtype=value.dtype)
            missing[at.key] = experts * len(at.rule.parts)
        at.view(wholes[at.key]).copy_(value)
        missing[at.key] -= 1
        if not missing[at.key]:
            yield at.key, wholes.pop(at.key)
    assert not wholes, f"experts of {', '.join(wholes)} did not come"
