"""Structural edits: changes of a graph's nodes, told as typed records and replayed.

The same edits are replayed on every entry (scoring, generation), when a checkpoint is loaded, and on the modules of
transformers, so they name weights, never nodes. Changes of weight values are not edits.

All edits of one weight together say which ops stand before its linears: each takes its place in the list of running
edits (`running`), and the list, in the order of `place`, is what graphs and modules get. A new kind of edit is one
record, here or in another package: it names its ops, replays, exports and undoes itself.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, fx

from aqtx.errors import InputError, nearest
from aqtx.numerics.hadamard import LARGEST, hadamard
from aqtx.program.hadamard_op import OP as HADAMARD
from aqtx.program.hadamard_op import buffers
from aqtx.program.inserted_ops import ACTIVATION_OPS, INSERTED_OPS, Step, get_attr, replace_inserted
from aqtx.program.site import weight_node

Operation = Callable[[Tensor, Tensor | None], Tensor]  # input, offsets of the experts' rows -> input


@dataclass(frozen=True, kw_only=True)
class Edit:
    """A change of what stands before the linears of one weight."""

    kind: ClassVar[str]
    ops: ClassVar[tuple[Any, ...]] = ()  # that `step` puts into graphs
    place: ClassVar[int] = 0  # edits of a lower place come first, whichever was made first

    weight: str

    def running(self, before: "list[Edit]") -> "list[Edit]":
        """The edits of this weight that are in force after this one."""
        return [*before, self]

    def buffers(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """What the edit's op reads beside its input, by buffer name, in the dtype that the graph computes in."""
        return {}

    def step(self, graph_module: fx.GraphModule, node: fx.Node) -> Step:
        """The op that stands before a linear or grouped linear node."""
        raise NotImplementedError

    def operation(self, buffer: Callable[[str], Tensor]) -> Operation:
        """The same op as a function of a module's input; `buffer` finds what `buffers` named."""
        raise NotImplementedError

    def undo(self, matrix: Tensor) -> Tensor | None:
        """The float64 matrix [N, K] that does without the op what `matrix` does behind it; None where there is none."""
        return None

    def to_json(self) -> dict[str, Any]:
        """The record as config.json and resume points hold it."""
        return {"edit": self.kind, **asdict(self)}


KINDS: dict[str, type[Edit]] = {}
Record = TypeVar("Record", bound=type[Edit])


def edit_kind(name: str) -> Callable[[Record], Record]:
    """Class decorator that makes a record known under its name in files."""

    def add(cls: Record) -> Record:
        if name in KINDS:
            raise ValueError(f"the kind of edit {name!r} is registered twice")
        cls.kind = name
        INSERTED_OPS.update(cls.ops)
        KINDS[name] = cls
        return cls

    return add


@edit_kind("hadamard")
@dataclass(frozen=True, kw_only=True)
class Hadamard(Edit):
    """Rotate the input, block by block; linears with one input share the rotation.

    x -> quantize -> linear        becomes        x -> rotate -> quantize -> linear
    """

    ops: ClassVar[tuple[Any, ...]] = (HADAMARD,)

    block: int
    seed: int | None = None

    def buffers(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The rotation's factors."""
        return buffers(self.block, self.seed, dtype)

    def step(self, graph_module: fx.GraphModule, node: fx.Node) -> Step:
        """`aqtx::hadamard` with its matrices."""
        blank = self.buffers(torch.float32)
        return HADAMARD, tuple(get_attr(graph_module, name, value) for name, value in blank.items())

    def operation(self, buffer: Callable[[str], Tensor]) -> Operation:
        """The rotation of a module's input."""
        names = list(self.buffers(torch.float32))
        return lambda x, offsets: HADAMARD(x, *(buffer(name) for name in names))

    def undo(self, matrix: Tensor) -> Tensor:
        """x Q W^T = x (W Q^T)^T."""
        return hadamard(matrix, self.block, seed=self.seed, inverse=True)


@edit_kind("remove_hadamard")
@dataclass(frozen=True, kw_only=True)
class RemoveHadamard(Edit):
    """Take the rotation off the input: it lies in the weights before it now."""

    def running(self, before: list[Edit]) -> list[Edit]:
        """All but the last rotation."""
        last = max(index for index, edit in enumerate(before) if isinstance(edit, Hadamard))
        return before[:last] + before[last + 1 :]


@edit_kind("quantize_activation")
@dataclass(frozen=True, kw_only=True)
class QuantizeActivation(Edit):
    """Quantize the input per token; one format for all rows, or one per expert, "" where an expert's stays as it is."""

    ops: ClassVar[tuple[Any, ...]] = ACTIVATION_OPS
    place: ClassVar[int] = 1

    formats: tuple[str, ...]

    def step(self, graph_module: fx.GraphModule, node: fx.Node) -> Step:
        """The op for rows that are alike, or for rows sorted by expert."""
        alike, grouped = ACTIVATION_OPS
        if len(set(self.formats)) == 1:
            return alike, (self.formats[0],)
        return grouped, (node.args[2], ",".join(self.formats))

    def operation(self, buffer: Callable[[str], Tensor]) -> Operation:
        """The same of a module's input."""
        alike, grouped = ACTIVATION_OPS
        if len(set(self.formats)) == 1:
            return lambda x, offsets: alike(x, self.formats[0])
        return lambda x, offsets: grouped(x, offsets, ",".join(self.formats))


def edit_from_json(told: Any) -> Edit:
    """The record that `to_json` told.

    Raises:
        InputError: it is no record of a known kind.
    """
    if not isinstance(told, dict) or not isinstance(told.get("edit"), str):
        raise InputError(f"a structural edit must be an object with a string under 'edit', got {told!r}")
    kind = KINDS.get(told["edit"])
    if kind is None:
        raise InputError(f"unknown structural edit {told['edit']!r}{nearest(told['edit'], KINDS)}")
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in told.items() if key != "edit"
    }
    if values.keys() != {item.name for item in fields(kind)}:
        wanted = ", ".join(item.name for item in fields(kind))
        raise InputError(f"the structural edit {told['edit']!r} has the keys {', '.join(values)}, expected {wanted}")
    for item in fields(kind):
        if not _fits(item.name, values[item.name]):
            raise InputError(f"the structural edit {told['edit']!r}: {item.name} cannot be {values[item.name]!r:.80}")
    return kind(**values)


def _fits(name: str, value: Any) -> bool:
    """Whether a value is of its field's type and within what any model has; fields of other kinds pass."""
    whole = type(value) is int
    if name == "block":
        return whole and 1 <= value <= LARGEST
    if name == "seed":
        return value is None or (whole and 0 <= value < 2**63)
    if name == "weight":
        return isinstance(value, str)
    return name != "formats" or (isinstance(value, tuple) and all(isinstance(entry, str) for entry in value))


def in_force(edits: Iterable[Edit]) -> list[Edit]:
    """The edits of one weight that still run, in the order in which they do."""
    running: list[Edit] = []
    for edit in edits:
        running = edit.running(running)
    return sorted(running, key=lambda edit: edit.place)


def by_weight(edits: Iterable[Edit]) -> dict[str, list[Edit]]:
    """Edits grouped by the weight that they name."""
    grouped: dict[str, list[Edit]] = {}
    for edit in edits:
        grouped.setdefault(edit.weight, []).append(edit)
    return grouped


def replay(graph_module: fx.GraphModule, edits: Sequence[Edit]) -> None:
    """Make what stands before the linears of one entry's graph what all edits of their weights say."""
    if not edits:
        return
    graph, readers = graph_module.graph, linears_by_weight(graph_module.graph)
    for weight, members in by_weight(edits).items():
        for node in readers.get(weight, []):
            replace_inserted(node, [edit.step(graph_module, node) for edit in in_force(members)])
    for node in [node for node in graph.nodes if node.op == "get_attr" and not node.users]:
        graph.erase_node(node)
    graph.lint()
    graph_module.recompile()


def linears_by_weight(graph: fx.Graph) -> dict[str, list[fx.Node]]:
    """The linear and grouped linear nodes that multiply with each parameter."""
    found: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if (weight := weight_node(node)) is not None:
            found.setdefault(str(weight.target), []).append(node)
    return found


def nodes_reading(graph: fx.Graph, weight: str) -> list[fx.Node]:
    """The linear and grouped linear nodes that multiply with one parameter."""
    return linears_by_weight(graph).get(weight, [])
