"""A traced model: graphs, weights by name, and the sites where a weight matrix meets its input."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from aqtx.formats import MixedExperts, QuantizedTensor, dequantized
from aqtx.program.codes import CodeStore
from aqtx.program.edits import Edit, by_weight, replay
from aqtx.program.plan import Plan
from aqtx.program.roles_by_use import roles_of
from aqtx.program.run_ops import runnable
from aqtx.program.site import Site, sites_of
from aqtx.program.weights import WeightStore

_CPU = torch.device("cpu")


@dataclass(eq=False)
class Program:
    """What passes transform. Graph parameters stay on meta; values live in `weights`."""

    entries: dict[str, fx.GraphModule]
    weights: WeightStore
    buffers: dict[str, Tensor]
    config: dict[str, Any]
    dtype: torch.dtype
    device: torch.device = _CPU
    folder: Path | None = None
    packed_source: str | None = None  # how the weights of the source were packed, in words; by others than aqtx
    plan: Plan | None = None
    codes: CodeStore = field(init=False)  # results of rounding by site
    emitted: bool = False  # whether graphs compute with the packed codes or with what they dequantize to
    edits: list[Edit] = field(default_factory=list)  # structural edits so far, replayed at load
    history: list[str] = field(default_factory=list)  # names of the passes that ran
    trainable: list[str] = field(default_factory=list)  # parameters that training passes may change
    trace_entry: Callable[[str], fx.GraphModule] | None = None

    @property
    def graph(self) -> fx.Graph:
        """The graph of the `score` entry."""
        return self.entries["score"].graph

    def __post_init__(self) -> None:
        """An empty store of codes in the program's dtype."""
        self.codes = CodeStore(self.dtype)

    def __repr__(self) -> str:
        """Its kind, size and state; the graphs would fill pages."""
        state = ", ".join(self.history) or "untouched"
        name = self.config.get("model_type", "module")
        return f"Program({name}, {len(self.sites())} sites, {str(self.dtype).removeprefix('torch.')}, {state})"

    def sites(self) -> list[Site]:
        """All sites in graph order, experts ascending."""
        return [site for node in self.graph.nodes for site in sites_of(node, self.weights, self._roles)]

    @cached_property
    def _roles(self) -> dict[str, str]:
        """Categories by parameter; passes change none."""
        return roles_of(self.graph, self.weights.specs)

    def to(self, device: torch.device | str) -> "Program":
        """Compute on this device from now on: passes, and modules made after this. Returns the program."""
        self.device = torch.device(device)
        return self

    def read(self, site: Site) -> Tensor:
        """The site's matrix [N, K], a float32 copy."""
        return self.weights.precise(site.weight, site.expert)

    def entry(self, name: str) -> fx.GraphModule:
        """An entry's graph; `step` is traced when first asked for, with all structural edits replayed."""
        if name not in self.entries:
            if self.trace_entry is None:
                raise ValueError(f"the program has no entry {name!r}")
            self.entries[name] = self.trace_entry(name)
            replay(self.entries[name], self.edits)
        return self.entries[name]

    def edit(self, *edits: Edit) -> None:
        """Make structural edits on every entry and remember them; many in one call compile the graphs once."""
        self.edits.extend(edits)
        for edit in edits:
            self.buffers.update(edit.buffers(self.dtype))
        touched = by_weight(edits)
        for graph_module in self.entries.values():
            replay(graph_module, [edit for edit in self.edits if edit.weight in touched])

    def without_codes(self) -> "Program":
        """The same graphs over the weights before rounding; a view that shares everything but the codes."""
        return replace(self, emitted=False)  # `codes` is no field of the constructor: the view gets an empty store

    def sites_by_weight(self) -> dict[str, list[Site]]:
        """Sites grouped by the parameter that holds them."""
        grouped: dict[str, list[Site]] = {}
        for site in self.sites():
            grouped.setdefault(site.weight, []).append(site)
        return grouped

    def parameters(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Parameters as they stand: rounded where codes exist, else as the store has them."""

        sites = self.sites_by_weight()
        rounded = {name for name, members in sites.items() if any(site.name in self.codes for site in members)}
        return {name: assemble(self, sites[name]) if name in rounded else self.weights.get(name) for name in names}

    def stored(self, site: Site) -> Tensor:
        """One matrix as a checkpoint stores it: codes where they exist, else the weight itself."""
        return self.codes[site.name] if site.name in self.codes else self.weights.on_disk(site.weight, site.expert)

    def tied(self) -> set[str]:
        """Parameters, a tied head, that a checkpoint does not store: they equal another one and have no codes."""
        return {name for name in self.weights.shared() if name.removesuffix(".weight") not in self.codes}

    def loaded(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Parameters as they stand, packed where they were emitted, and buffers, on the device; not for writing."""
        names = list(names)
        found = self.parameters(name for name in names if name in self.weights.specs)
        found |= {name: self.buffers[name] for name in names if name in self.buffers}
        return {name: value.to(self.device) for name, value in found.items()}

    def module(self, entry: str = "score") -> nn.Module:
        """A runnable module over the program's weights: `ids [B, S] -> logits [B, S, V]`."""
        source = self.entry(entry)
        names = [node.target for node in source.graph.nodes if node.op == "get_attr"]
        values = self.parameters(name for name in names if name in self.weights.specs)
        buffers = {name: self.buffers[name] for name in names if name in self.buffers}
        return bind(source.graph, values, buffers, self.device)

    def scorer(self) -> Callable[[Tensor], Tensor]:
        """`module()` for token ids wherever they lie; logits are on the program's device."""
        return taking_ids_to(self.device, self.module())


def taking_ids_to(device: torch.device, module: nn.Module) -> Callable[[Tensor], Tensor]:
    """A module of token ids that takes them to its device first."""
    return lambda ids: module(ids.to(device))


def bind(
    source: fx.Graph, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], device: torch.device
) -> fx.GraphModule:
    """A copy of a graph over real tensors; device arguments of its nodes point to `device`."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(source, {}))
    graph._codegen = source._codegen
    root = nn.Module()
    for name, value in parameters.items():
        _assign(root, name, nn.Parameter(value.to(device), requires_grad=False))
    for name, value in buffers.items():
        _assign(root, name, value.to(device))
    for node in graph.nodes:
        node.target = runnable(node.target)
        node.args = fx.node.map_aggregate(node.args, lambda value: device if isinstance(value, torch.device) else value)
        node.kwargs = {key: device if isinstance(value, torch.device) else value for key, value in node.kwargs.items()}
    bound = fx.GraphModule(root, graph)
    return bound.eval()


def _assign(root: nn.Module, name: str, value: Tensor) -> None:
    """Set a parameter or buffer under its dotted name, making the modules on the way."""
    *path, leaf = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    if isinstance(value, nn.Parameter):
        root.register_parameter(leaf, value)
    else:
        root.register_buffer(leaf, value, persistent=False)


def _computed(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """What graphs compute with: codes as they are, a matrix in its parameter's dtype, which files may hold wider."""
    return stored if isinstance(stored, QuantizedTensor) else stored.to(dtype)


def assemble(program: "Program", sites: "list[Site]") -> Tensor:
    """The parameter of `sites` (all of one weight): rounded where codes exist, as stored elsewhere.

    Of an emitted program a plain matrix gives its `QuantizedTensor` and a stack `MixedExperts`,
    whose experts may carry different formats; before that, the values that the codes mean.
    """
    dtype = program.weights.specs[sites[0].weight].dtype
    matrices = [_computed(program.stored(site), dtype) for site in sites]
    if not program.emitted:
        values = [dequantized(matrix) for matrix in matrices]
        return values[0] if sites[0].expert is None else torch.stack(values)
    if sites[0].expert is None:
        return matrices[0]

    return MixedExperts.from_experts(matrices, program.dtype)
