"""The residual stream of all calibration batches between two blocks, in memory or on disk."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, fx

from aqtx.machine.tensor_record import load_tensors, save_tensors
from aqtx.program.blocks import Values

Mark = list[dict[fx.Node, Any]]


@contextmanager
def scratch_folder(work: Path | None) -> Iterator[Path]:
    """A place for streams: below the run's own folder, cleared of what a killed run left, or a temporary one."""
    if work is None:
        with tempfile.TemporaryDirectory() as made:
            yield Path(made)
        return
    folder = work / "stream"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Stream:
    """Values that blocks hand on, by batch and node. Only tensors go to disk; one file each, mapped when read.

    With `keep` nothing is let go, so that `mark` and `rewind` lead back to the values that stood between two blocks.
    """

    def __init__(self, num_batches: int, folder: Path | None = None, *, keep: bool = False) -> None:
        self.folder, self.keep = folder, keep
        self._batches: list[dict[fx.Node, Any]] = [{} for _ in range(num_batches)]
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def __len__(self) -> int:
        return len(self._batches)

    def read(self, batch: int, device: torch.device) -> Values:
        """A batch's values, on the device."""
        return {node: self._load(value, device) for node, value in self._batches[batch].items()}

    def write(self, batch: int, values: Values) -> None:
        """Replace a batch's values; one equal to the first batch's is kept once (rotations, masks)."""
        first, before = self._batches[0], self._batches[batch]
        after: dict[fx.Node, Any] = {}
        for node, value in values.items():
            if node in before:
                after[node] = before[node]  # carried through: it has not changed
            elif batch and _equal(first.get(node), value):
                after[node] = first[node]
            else:
                after[node] = self._store(batch, node, value)
        self._batches[batch] = after
        if self.keep:
            return
        kept = {str(value) for value in after.values() if isinstance(value, Path)}
        for value in before.values():
            if isinstance(value, Path) and str(value) not in kept:
                value.unlink(missing_ok=True)

    def append(self, values: Values) -> int:
        """A further batch; returns its number."""
        self._batches.append({})
        self.write(len(self._batches) - 1, values)
        return len(self._batches) - 1

    def mark(self) -> Mark:
        """Where the stream stands: all batches' values as they are now."""
        return list(self._batches)

    def rewind(self, mark: Mark) -> None:
        """Stand where the stream stood; only one that keeps its values can."""
        self._batches = list(mark)

    def save(self, file: Path, told: Any) -> None:
        """Write all batches' values to a file, for `restore`; what several batches share stands there once."""
        tensors: dict[str, Tensor] = {}
        keys: dict[int, str] = {}
        rows: list[dict[str, Any]] = []
        for batch, values in enumerate(self._batches):
            row: dict[str, Any] = {}
            for node, value in values.items():
                if not isinstance(value, Tensor | Path):
                    row[node.name] = [value]
                    continue
                row[node.name] = key = keys.setdefault(id(value), f"{batch}/{node.name}")
                if key not in tensors:
                    tensors[key] = self._load(value, torch.device("cpu"))
            rows.append(row)
        save_tensors(file, tensors, {"rows": rows, "told": told})

    def restore(self, file: Path, graph: fx.Graph) -> Any | None:
        """Stand where `save` stood; what it was told, or None where there is no such file."""
        found = load_tensors(file)
        if found is None:
            return None
        tensors, data = found
        nodes = {node.name: node for node in graph.nodes}
        stored: dict[str, Any] = {}
        for batch, row in enumerate(data["rows"]):
            values: dict[fx.Node, Any] = {}
            for name, key in row.items():
                if isinstance(key, str) and key not in stored:
                    stored[key] = self._store(batch, nodes[name], tensors[key])
                values[nodes[name]] = stored[key] if isinstance(key, str) else key[0]
            self._batches[batch] = values
        return data["told"]

    def _store(self, batch: int, node: fx.Node, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if self.folder is None or batch == 0:  # what others are compared with stays in memory
            return value.cpu()
        file = self.folder / f"{batch}-{node.name}.stream"
        save_file({"value": value.contiguous()}, file)
        return file

    @staticmethod
    def _load(value: Any, device: torch.device) -> Any:
        if isinstance(value, Path):
            value = load_file(value)["value"]
        return value.to(device) if isinstance(value, Tensor) else value


def _equal(one: Any, other: Any) -> bool:
    """Equal without reading anything from disk."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other.cpu())
    return False
