"""Weights of a checkpoint folder by parameter name, packed or plain, read when asked for."""

import torch
from torch import Tensor

from aqtx.checkpoint.reader import CheckpointReader
from aqtx.errors import InputError
from aqtx.formats import MixedExperts, QuantizedTensor
from aqtx.formats.decode import PARTS
from aqtx.machine.dtypes import widest
from aqtx.program.names import NamesTable, expert_key, is_stacked


class CheckpointSource:
    """Weights of a checkpoint folder by parameter name; stacks are put together when asked for."""

    def __init__(self, reader: CheckpointReader, formats: dict[str, str], dtype: torch.dtype) -> None:
        self.reader = reader
        self.formats = formats
        self.dtype = dtype
        self.shapes: dict[str, tuple[int, ...]] = {}  # logical shapes by parameter, known once the model is built

    def parameter(self, name: str) -> Tensor:
        """The whole parameter; experts of a stack with any format among them become `MixedExperts`."""
        shape = self.shapes[name]
        if not is_stacked(name, shape):
            return self._matrix(name, shape)
        experts = [self.expert(name, index) for index in range(shape[0])]
        if any(isinstance(expert, QuantizedTensor) for expert in experts):
            return MixedExperts.from_experts(experts, self.dtype)
        return torch.stack(experts)

    def stored(self, name: str) -> Tensor | None:
        """A parameter as it lies in the file under its own name, None where it does not."""
        return self.reader.get(name) if name in self.reader else None

    def expert(self, name: str, index: int) -> Tensor:
        """One expert's matrix."""
        return self._matrix(expert_key(name, index), self.shapes[name][1:])

    def own_dtype(self, name: str) -> torch.dtype | None:
        """The widest that any of its matrices lies in, None where one is packed."""
        keys = NamesTable({name: self.shapes[name]}).to_disk[name]
        if any(key not in self.reader or key.removesuffix(".weight") in self.formats for key in keys):
            return None
        return widest(self.reader.own_dtype(key) for key in keys)

    def _matrix(self, key: str, shape: tuple[int, ...]) -> Tensor:
        site = key.removesuffix(".weight")
        if site not in self.formats:
            return self.reader.get(key)
        if problems := self.reader.part_problems(key, self.formats[site], shape):
            raise InputError(*problems)
        parts = {part: self.reader.get(f"{key}.{part}") for part in PARTS if f"{key}.{part}" in self.reader}
        try:
            return QuantizedTensor.from_disk(parts, self.formats[site], shape, self.dtype)
        except InputError as error:
            raise InputError(*(f"{key}: {problem}" for problem in error.problems)) from None
