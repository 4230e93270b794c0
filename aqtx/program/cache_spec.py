"""What a `step` entry wants of its cache: sizes and dtypes, from a traced graph or written down in a package."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, fx

_SLOTS = "slots"  # in the written form, where a size follows the length of the text


@dataclass(frozen=True)
class CacheSpec:
    """One tensor of a cache: its sizes behind the batch, None for the slots, of which a state has none."""

    sizes: tuple[int | None, ...]
    dtype: torch.dtype

    def shape(self, batch: int, slots: int) -> tuple[int, ...]:
        """Of `batch` sequences of up to `slots` tokens."""
        return batch, *(slots if size is None else size for size in self.sizes)

    def num_bytes(self, batch: int, slots: int) -> int:
        """Of the same."""
        return torch.Size(self.shape(batch, slots)).numel() * self.dtype.itemsize

    def make(self, batch: int, slots: int, device: torch.device) -> Tensor:
        """An empty tensor for them."""
        return torch.zeros(self.shape(batch, slots), dtype=self.dtype, device=device)

    def make_mapped(self, batch: int, slots: int, file: Path) -> Tensor:
        """The same in a file that is made; what is written goes there, and only pages in use take memory."""
        shape = torch.Size(self.shape(batch, slots))
        return torch.from_file(str(file), shared=True, size=shape.numel(), dtype=self.dtype).view(shape)

    def widen(self, part: Tensor, slots: int) -> Tensor:
        """The tensor with so many more slots behind those that it has; a state stays."""
        if None not in self.sizes:
            return part
        place = self.sizes.index(None) + 1
        more = [slots if at == place else have for at, have in enumerate(part.shape)]
        return torch.cat([part, part.new_zeros(more)], dim=place)

    def slots(self, part: Tensor) -> int | None:
        """How many slots a tensor has; None for a state."""
        return part.shape[self.sizes.index(None) + 1] if None in self.sizes else None


def of_graph(step: fx.GraphModule) -> list[CacheSpec]:
    """Of a traced `step` entry: after ids, pos and start come the caches, symbols in the place of batch and slots."""
    values = [node.meta["val"] for node in step.graph.nodes if node.op == "placeholder"][3:]
    return [CacheSpec(tuple(_size(size) for size in value.shape[1:]), value.dtype) for value in values]


def _size(size: int | torch.SymInt) -> int | None:
    return None if isinstance(size, torch.SymInt) else int(size)


def to_text(specs: Sequence[CacheSpec]) -> str:
    """`bfloat16 4 slots 64; ...`, a form that any language reads."""
    return "; ".join(" ".join([_name(spec.dtype), *map(_word, spec.sizes)]) for spec in specs)


def from_text(text: str) -> list[CacheSpec]:
    """The inverse of `to_text`."""
    found = []
    for part in filter(None, text.split("; ")):
        name, *sizes = part.split(" ")
        found.append(CacheSpec(tuple(None if size == _SLOTS else int(size) for size in sizes), getattr(torch, name)))
    return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _word(size: int | None) -> str:
    return _SLOTS if size is None else str(size)
