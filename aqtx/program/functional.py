"""In-place writes of a traced graph as values: what a node is computed from is then what its arguments say.

    a = new_empty(); v = slice(a); copy_(v, x); f(a)   becomes   a' = slice_scatter(a, copy(v, x)); f(a')

Everything that walks a graph (blocks, waves, rotations) follows arguments, and would drop a write
whose result nobody reads. Writes into a graph's inputs, such as a cache, stay: they are meant to be seen outside.
"""

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

_aten = torch.ops.aten
_SCATTERS = {
    _aten.slice.Tensor: _aten.slice_scatter.default,
    _aten.select.int: _aten.select_scatter.default,
    _aten.diagonal.default: _aten.diagonal_scatter.default,
}
_RESHAPES = (
    *(_aten.view.default, _aten.reshape.default, _aten.unflatten.int, _aten.flatten.using_ints),
    *(_aten.unsqueeze.default, _aten.squeeze.dim, _aten.squeeze.default, _aten.view_as.default),
)
_SAME = (_aten.alias.default, _aten.detach.default, _aten.contiguous.default)


class NotUnderstoodError(Exception):
    """A write through a view that is not in the tables here."""


def functionalize(graph: fx.Graph) -> bool:
    """Replace every write into a value that the graph itself made; returns whether there was one.

    Raises:
        NotUnderstoodError: a write goes through another view, or is of an op without a form that returns.
    """
    found = False
    place = {node: index for index, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if not _writes(node):
            continue
        path = _path(node.args[0])
        if path[-1].op != "call_function":
            continue
        found = True
        with graph.inserting_before(node):
            value = graph.call_function(_returning(node.target), node.args, node.kwargs)
            value.meta = dict(node.meta)
            made = [value]
            for view in path[:-1]:
                made.append(_put_back(graph, view, made[-1]))
                made[-1].meta = dict(view.args[0].meta)  # type: ignore[union-attr]
        place |= dict.fromkeys(made, place[node])
        _follow(graph, node, path[-1], made[-1], place)
    graph.lint()
    return found


def _writes(node: fx.Node) -> bool:
    """Whether a node writes into its first argument."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    schema = node.target._schema
    first = schema.arguments[0].alias_info if schema.arguments else None
    return schema.is_mutable and first is not None and first.is_write


def _reads_through(node: fx.Node) -> bool:
    """Whether a node is a view of its first argument, or may be one; or one of several views."""
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        return _reads_through(node.args[0])
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    schema = node.target._schema
    return not schema.is_mutable and bool(schema.arguments) and schema.arguments[0].alias_info is not None


def _path(node: Any) -> list[fx.Node]:
    """From a value up through its views to what holds the memory."""
    path = [node]
    while _reads_through(path[-1]) and isinstance(path[-1].args[0], fx.Node):
        path.append(path[-1].args[0])
    return path


def _returning(target: Any) -> Any:
    """The form of an in-place op that returns its result: `add_` -> `add`."""
    packet = getattr(_aten, target._schema.name.partition("::")[2].removesuffix("_"), None)
    overload = getattr(packet, target._overloadname, None)
    if overload is None:
        raise NotUnderstoodError(f"{target} has no form that returns its result")
    return overload


def _put_back(graph: fx.Graph, view: fx.Node, value: fx.Node) -> fx.Node:
    """What a view was taken of, with `value` in the view's place."""
    source, rest = view.args[0], view.args[1:]
    if view.target in _SCATTERS:
        return graph.call_function(_SCATTERS[view.target], (source, value, *rest), view.kwargs)
    if view.target in _RESHAPES:
        return graph.call_function(_aten.view_as.default, (value, source))
    if view.target is _aten.transpose.int:
        return graph.call_function(view.target, (value, *rest))
    if view.target in _SAME:
        return value
    raise NotUnderstoodError(f"a write through {view.target}")


def _follow(graph: fx.Graph, write: fx.Node, base: fx.Node, new: fx.Node, place: dict[fx.Node, int]) -> None:
    """Let what comes after a write read the new value, views that were made before it taken again."""
    after, written = place[write], {base: new}
    for view in list(_views(base, after, place)):  # a view of a view comes after it
        with graph.inserting_before(write):
            written[view] = graph.node_copy(view, lambda source: written.get(source, source))
        place[written[view]] = after
    written[write] = written[write.args[0]]  # type: ignore[index]
    for old, value in written.items():
        old.replace_all_uses_with(value, delete_user_cb=lambda user: place[user] > after, propagate_meta=False)
    graph.erase_node(write)
    for view in dict.fromkeys(reversed(written.values())):
        if not view.users:
            graph.erase_node(view)


def _views(base: fx.Node, before: int, place: dict[fx.Node, int]) -> Iterator[fx.Node]:
    """Views of a value, and their views, that were made before a place; each after what it is a view of."""
    for user in base.users:
        if place[user] < before and _reads_through(user) and user.args[0] is base:
            yield user
            yield from _views(user, before, place)
