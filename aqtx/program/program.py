"""A traced model: graphs, weights by name, and the sites where a weight matrix meets its input."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from aqtx.program.codes import CodeStore
from aqtx.program.names import expert_key
from aqtx.program.roles import category_of, layer_of
from aqtx.program.weights import WeightStore

if TYPE_CHECKING:
    from aqtx.program.plan import Plan

_CPU = torch.device("cpu")
LINEAR = torch.ops.aten.linear.default


def grouped_linear_op() -> Any:
    """The op of a stacked projection; its module registers it on import."""
    import aqtx.formats.grouped_linear  # noqa: F401

    return torch.ops.aqtx.grouped_linear.default


@dataclass(frozen=True, eq=False)
class Site:
    """One weight matrix [N, K] that may be quantized, and the node that uses it.

    Annotations are JSON values kept in `node.meta["custom"]["aqtx"]`, a list over experts each.
    """

    name: str
    weight: str
    expert: int | None
    shape: tuple[int, int]
    category: str
    layer: int | None
    node: fx.Node
    slots: int  # experts of the stack, 1 for a plain matrix

    @property
    def numel(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]

    def get(self, key: str, default: Any = None) -> Any:
        """An annotation of this site."""
        values = self.node.meta.get("custom", {}).get("aqtx", {}).get(key)
        value = None if values is None else values[self.expert or 0]
        return default if value is None else value

    def set(self, key: str, value: Any) -> None:
        """Annotate this site."""
        annotations = self.node.meta.setdefault("custom", {}).setdefault("aqtx", {})
        annotations.setdefault(key, [None] * self.slots)[self.expert or 0] = value


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
    plan: "Plan | None" = None
    codes: CodeStore = field(init=False)  # results of rounding by site
    emitted: bool = False  # whether graphs compute with the packed codes or with what they dequantize to
    edits: list[dict[str, Any]] = field(default_factory=list)  # structural edits so far, replayed at load
    history: list[str] = field(default_factory=list)  # names of the passes that ran
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
        return [site for node in self.graph.nodes for site in sites_of(node, self.weights)]

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
            from aqtx.program.edits import replay

            if self.trace_entry is None:
                raise ValueError(f"the program has no entry {name!r}")
            self.entries[name] = self.trace_entry(name)
            replay(self.entries[name], self.edits)
        return self.entries[name]

    def edit(self, *edits: dict[str, Any]) -> None:
        """Make structural edits on every entry and remember them; many in one call compile the graphs once."""
        from aqtx.program.edits import prepare, replay

        for edit in edits:
            prepare(self, edit)
        for graph_module in self.entries.values():
            replay(graph_module, list(edits))
        self.edits.extend(edits)

    def sites_by_weight(self) -> dict[str, list[Site]]:
        """Sites grouped by the parameter that holds them."""
        grouped: dict[str, list[Site]] = {}
        for site in self.sites():
            grouped.setdefault(site.weight, []).append(site)
        return grouped

    def parameters(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Parameters as they stand: rounded where codes exist, else as the store has them."""
        from aqtx.program.assemble import assemble

        sites = self.sites_by_weight()
        rounded = {name for name, members in sites.items() if any(site.name in self.codes for site in members)}
        return {name: assemble(self, sites[name]) if name in rounded else self.weights.get(name) for name in names}

    def stored(self, site: Site) -> Tensor:
        """One matrix as a checkpoint stores it: codes where they exist, else the weight itself."""
        return self.codes[site.name] if site.name in self.codes else self.weights.matrix(site.weight, site.expert)

    def tied(self) -> set[str]:
        """Parameters, a tied head, that a checkpoint does not store: they equal another one and have no codes."""
        return {name for name in self.weights.shared() if name.removesuffix(".weight") not in self.codes}

    def module(self, entry: str = "score") -> nn.Module:
        """A runnable module over the program's weights: `ids [B, S] -> logits [B, S, V]`."""
        source = self.entry(entry)
        names = [node.target for node in source.graph.nodes if node.op == "get_attr"]
        values = self.parameters(name for name in names if name in self.weights.specs)
        return bind(source, values, {name: self.buffers[name] for name in names if name in self.buffers}, self.device)

    def scorer(self) -> Callable[[Tensor], Tensor]:
        """`module()` for token ids wherever they lie; logits are on the program's device."""
        return taking_ids_to(self.device, self.module())


def taking_ids_to(device: torch.device, module: nn.Module) -> Callable[[Tensor], Tensor]:
    """A module of token ids that takes them to its device first."""
    return lambda ids: module(ids.to(device))


def bind(
    source: fx.GraphModule, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], device: torch.device
) -> fx.GraphModule:
    """A copy of a graph over real tensors; device arguments of its nodes point to `device`."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(source.graph, {}))
    graph._codegen = source.graph._codegen
    root = nn.Module()
    for name, value in parameters.items():
        _assign(root, name, nn.Parameter(value.to(device), requires_grad=False))
    for name, value in buffers.items():
        _assign(root, name, value.to(device))
    for node in graph.nodes:
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


def weight_node(node: fx.Node) -> fx.Node | None:
    """The parameter that a linear or grouped linear multiplies with, or None for another node."""
    if node.op != "call_function" or node.target not in (LINEAR, grouped_linear_op()):
        return None
    weight = node.args[1]
    return weight if isinstance(weight, fx.Node) and weight.op == "get_attr" else None


def sites_of(node: fx.Node, weights: WeightStore) -> list[Site]:
    """The sites of one node: one for a linear, one per expert for a grouped linear."""
    weight = weight_node(node)
    if weight is None or weight.target not in weights.specs:
        return []
    parameter = str(weight.target)
    shape = weights.specs[parameter].shape
    matrix = (shape[-2], shape[-1])
    if node.target is LINEAR:
        name = parameter.removesuffix(".weight")
        return [Site(name, parameter, None, matrix, category_of(name), layer_of(name), node, 1)]
    names = [expert_key(parameter, expert).removesuffix(".weight") for expert in range(shape[0])]
    return [
        Site(name, parameter, expert, matrix, category_of(name), layer_of(name), node, shape[0])
        for expert, name in enumerate(names)
    ]
