"""Parameters of a model and tensors of a checkpoint: a two-way table of names.

A stacked parameter `P.experts.proj` [E, N, K] lies on disk as E tensors `P.experts.<e>.proj.weight`;
every other parameter lies there under its own name. A quantized matrix `KEY` lies there as
`KEY.qdata`, `KEY.scale` and, where its format has them, `KEY.zero_point`, `KEY.per_tensor_scale` or `KEY.super_scale`.
"""

import re
from collections.abc import Mapping

Shape = tuple[int, ...]
_EXPERT = re.compile(r"^(?P<prefix>.*\.experts)\.(?P<index>\d+)\.(?P<projection>[^.]+)\.weight$")


def is_stacked(parameter: str, shape: Shape) -> bool:
    """Whether a parameter holds all experts of a layer."""
    return len(shape) == 3 and parameter.rpartition(".")[0].endswith(".experts")


def expert_key(parameter: str, expert: int) -> str:
    """The tensor on disk that holds one expert of a stacked parameter."""
    prefix, _, projection = parameter.rpartition(".")
    return f"{prefix}.{expert}.{projection}.weight"


def stacked_name(key: str) -> tuple[str, int] | None:
    """The stacked parameter and expert of a tensor on disk, or None for another kind of name."""
    found = _EXPERT.match(key)
    return (f"{found['prefix']}.{found['projection']}", int(found["index"])) if found else None


class NamesTable:
    """Names of one model both ways; making it fails if the names are not one to one."""

    def __init__(self, shapes: Mapping[str, Shape]) -> None:
        self.shapes = dict(shapes)
        self.to_disk: dict[str, list[str]] = {}
        self.from_disk: dict[str, tuple[str, int | None]] = {}
        for name, shape in self.shapes.items():
            experts = range(shape[0]) if is_stacked(name, shape) else (None,)
            self.to_disk[name] = [name if expert is None else expert_key(name, expert) for expert in experts]
            for expert, key in zip(experts, self.to_disk[name], strict=True):
                if key in self.from_disk:
                    raise ValueError(f"{key} stands for both {name} and {self.from_disk[key][0]}")
                self.from_disk[key] = (name, expert)

    def matrix_shape(self, key: str) -> Shape:
        """The shape of a tensor on disk, unquantized."""
        name, expert = self.from_disk[key]
        return self.shapes[name] if expert is None else self.shapes[name][1:]
