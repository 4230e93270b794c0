"""From a checkpoint or a module to a `Program`: export on meta, canonical graphs, weights by name."""

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils._sympy.numbers import int_oo

from aqtx.errors import InputError
from aqtx.program.functional import NotUnderstoodError, functionalize
from aqtx.program.program import Program
from aqtx.program.weights import Spec, WeightStore

LONGEST = "longest"  # key of a graph module's `meta`: the most tokens in a row that the graph holds for, None any
_DYNAMIC = torch.export.Dim.DYNAMIC
_ENDLESS = 1 << 31
_ASSERTIONS = (
    torch.ops.aten._assert_tensor_metadata.default,
    torch.ops.aten._assert_scalar.default,
    torch.ops.aten.sym_constrain_range_for_size.default,
    torch.ops.aten.sym_constrain_range.default,
)

# graphs of configs as they were traced, the last few, since a trace takes seconds
_KEPT: OrderedDict[tuple[str, ...], fx.GraphModule] = OrderedDict()
_MOST_KEPT, _MOST_NODES = 8, 4000


def copy_on_meta(model: nn.Module) -> nn.Module:
    """The module without values; parameters that are tied stay tied, which `.to` alone would part."""
    blank = copy.deepcopy(model).to("meta")
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        original = first.setdefault(id(parameter), name)
        if original != name:
            owner, _, leaf = name.rpartition(".")
            setattr(blank.get_submodule(owner), leaf, blank.get_parameter(original))
    return blank


def build_program(
    make: Callable[[], nn.Module],
    source: Any,
    *,
    config: dict[str, Any],
    dtype: torch.dtype,
    buffers: dict[str, Tensor] | None = None,
    folder: Path | None = None,
) -> Program:
    """A Program over `source` from a maker of the model on meta.

    `buffers` come with a user's own module. Without them `config` alone decides what is made, and one that was traced
    before is not traced again.
    """
    with torch.device("meta"):
        model = make().eval()
    by_config = buffers is None
    buffers = {name: value.clone() for name, value in model.named_buffers()} if buffers is None else buffers
    model = model.to("meta")
    for parameter in model.parameters():
        if not getattr(parameter, "keeps_dtype", False):
            parameter.data = parameter.data.to(dtype)
    tied = untie(model)
    specs = {name: Spec(tuple(value.shape), value.dtype) for name, value in model.named_parameters()}
    key = (repr(type(model)), repr(config), str(dtype), str(torch.get_default_dtype()))

    def traced(entry: str) -> fx.GraphModule:
        if not by_config:
            return export_entry(model, entry)
        return _once((*key, entry), lambda: export_entry(model, entry))

    return Program(
        entries={"score": traced("score")},
        weights=WeightStore(specs, source, tied=tied),
        buffers=buffers,
        config=config,
        dtype=dtype,
        folder=folder,
        trace_entry=traced,
    )


def _once(key: tuple[str, ...], trace: Callable[[], fx.GraphModule]) -> fx.GraphModule:
    """A copy of the graph that is kept under `key`, traced where there is none."""
    if key in _KEPT:
        _KEPT.move_to_end(key)
        return _copied(_KEPT[key])
    made = trace()
    if len(made.graph.nodes) <= _MOST_NODES:
        _KEPT[key] = _copied(made)
        if len(_KEPT) > _MOST_KEPT:
            _KEPT.popitem(last=False)
    return made


def _copied(graph_module: fx.GraphModule) -> fx.GraphModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, about how it copies its descriptions of inputs
        return copy.deepcopy(graph_module)


def untie(model: nn.Module) -> dict[str, str]:
    """Give each tied parameter of a model on meta a name of its own; {second name: first name}."""
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        original = first.setdefault(id(parameter), name)
        if original != name:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, nn.Parameter(torch.empty_like(parameter)))
            tied[name] = original
    return tied


def export_entry(model: nn.Module, entry: str) -> fx.GraphModule:
    """Export one entry of a model on meta and make its graph canonical."""
    arguments, dynamic = example_inputs(model, entry)
    with torch.no_grad():
        exported = torch.export.export(model, arguments, dynamic_shapes=dynamic, strict=False)
    made = canonical(exported.module(check_guards=False))
    try:
        functionalize(made.graph)
    except NotUnderstoodError:  # torch's own way knows every op, but takes as long as the trace and respells views
        made = canonical(exported.run_decompositions({}).module(check_guards=False))
    made = canonical(made)
    made.meta[LONGEST] = _longest(exported)
    return made


def _longest(exported: ExportedProgram) -> int | None:
    """The most tokens in a row that an export holds for, where torch found a limit.

    A loop over pieces of a text was followed for as many pieces as the example has.
    """
    ids = next(node for node in exported.graph.nodes if node.name in exported.graph_signature.user_inputs)
    found = exported.range_constraints.get(ids.meta["val"].shape[1].node.expr)
    return None if found is None or found.upper == int_oo or found.upper > _ENDLESS else int(found.upper)


def example_inputs(model: nn.Module, entry: str) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Inputs on meta to trace an entry with, and which of their dimensions are dynamic."""
    ids = torch.zeros(2, 16, dtype=torch.long, device="meta")
    batch_and_length = {0: _DYNAMIC, 1: _DYNAMIC}
    if entry == "score":
        return (ids,), (batch_and_length,)
    if not hasattr(model, "make_cache"):
        raise InputError(f"{type(model).__name__} cannot go on from a cache: only aqtx's own architectures can")
    cache, longer = ([tensor.to("meta") for tensor in model.make_cache(2, slots)] for slots in (32, 33))  # type: ignore[operator]
    places = torch.zeros(16, dtype=torch.long, device="meta")
    start = torch.zeros(2, dtype=torch.long, device="meta")
    dynamic_cache = [
        {0: _DYNAMIC} | {at: _DYNAMIC for at in range(1, one.dim()) if one.shape[at] != other.shape[at]}
        for one, other in zip(cache, longer, strict=True)
    ]
    return (ids, places, start, cache), (batch_and_length, {0: _DYNAMIC}, {0: _DYNAMIC}, dynamic_cache)


def canonical(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Strip guards and assertions: they bake in the dtype and device of the trace."""
    graph = graph_module.graph
    for node in reversed(list(graph.nodes)):
        guard = node.op == "call_module" and node.target == "_guards_fn"
        if guard or (node.op == "call_function" and node.target in _ASSERTIONS):
            graph.erase_node(node)
    graph.eliminate_dead_code()
    graph.lint()
    graph_module.recompile()
    return graph_module
