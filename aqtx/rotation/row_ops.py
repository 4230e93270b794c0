"""What a graph's ops do to the last dimension: the facts from which it is proven where a rotation may go.

A rotation of the last dimension passes an op only if the op treats each row by itself and alike: it
moves rows, sums rows, or scales a row by one number. Whatever is not on the list here is not proven.
"""

from collections.abc import Callable

import torch
from torch import fx

from aqtx.program.hadamard_op import OP as HADAMARD
from aqtx.program.inserted_ops import INSERTED_OPS
from aqtx.program.site import GROUPED_LINEAR, LINEAR, weight_node

aten = torch.ops.aten
SHAPE_ONLY = (aten.sym_size.int,)


class Unproven(Exception):
    """A walk met an op that it cannot prove harmless; the message is the reason."""


def is_linear(node: fx.Node) -> bool:
    """Whether a node multiplies with a weight."""
    return node.op == "call_function" and node.target in (LINEAR, GROUPED_LINEAR)


def is_hadamard(node: object) -> bool:
    """Whether a node is a rotation that an edit inserted."""
    return isinstance(node, fx.Node) and node.target is HADAMARD


def is_inserted(node: fx.Node) -> bool:
    """Whether a node is a rotation or a quantization that an edit put before a linear."""
    return node.target in INSERTED_OPS


def described(node: fx.Node) -> str:
    """An op and the node's name, as a refusal names it."""
    return f"{node.target} ({node.name})"


def width(node: fx.Node) -> int | None:
    """Size of the last dimension, None where it is unknown or not a tensor's."""
    shape = tuple(getattr(node.meta.get("val"), "shape", ()))
    return shape[-1] if shape and isinstance(shape[-1], int) else None


def _rank(node: fx.Node) -> int:
    return len(getattr(node.meta.get("val"), "shape", ()))


def _same_width(node: fx.Node, source: fx.Node) -> bool:
    """A reshape whose last dimension stays keeps every row together."""
    return width(node) is not None and width(node) == width(source)


def _other_dims(*places: int) -> Callable[[fx.Node, fx.Node], bool]:
    """The dimension arguments at `places` do not name the last dimension."""

    def check(node: fx.Node, source: fx.Node) -> bool:
        named = [node.args[place] for place in places if place < len(node.args)]
        dims = [dim for value in named for dim in (value if isinstance(value, (list, tuple)) else [value])]
        return bool(dims) and all(isinstance(dim, int) and dim % _rank(source) != _rank(source) - 1 for dim in dims)

    return check


def _leading_index(node: fx.Node, source: fx.Node) -> bool:
    indices = node.args[1]
    assert isinstance(indices, (list, tuple))
    return len(indices) < _rank(source) or indices[-1] is None


def _row_scale(node: fx.Node, source: fx.Node) -> bool:
    """Times a number, or a tensor with one number per row."""
    other = node.args[1] if node.args[0] is source else node.args[0]
    if not isinstance(other, fx.Node):
        return True
    return other is not source and width(other) in (1, None) and _same_width(node, source)


def _always(node: fx.Node, source: fx.Node) -> bool:
    return True


ROWWISE: dict[object, Callable[[fx.Node, fx.Node], bool]] = {
    **dict.fromkeys((aten.view.default, aten.reshape.default, aten.view_as.default), _same_width),
    **dict.fromkeys((aten.flatten.using_ints, aten.unflatten.int, aten.expand.default), _same_width),
    **dict.fromkeys((aten.unsqueeze.default, aten.squeeze.dim), _same_width),
    **dict.fromkeys((aten.contiguous.default, aten.clone.default, aten.alias.default, aten.dropout.default), _always),
    aten.to.dtype: _same_width,
    aten.index.Tensor: _leading_index,
    aten.slice.Tensor: _other_dims(1),
    aten.select.int: _other_dims(1),
    aten.transpose.int: _other_dims(1, 2),
    aten.sum.dim_IntList: _other_dims(1),
    aten.mul.Tensor: _row_scale,
    aten.div.Tensor: _row_scale,
}


def is_rowwise(node: fx.Node, source: fx.Node) -> bool:
    """Whether `node` treats the rows of its argument `source` by themselves and alike."""
    check = ROWWISE.get(node.target)
    if node.target is aten.div.Tensor and node.args[0] is not source:
        return False
    return check is not None and check(node, source)


def only_shape(user: fx.Node, node: fx.Node) -> bool:
    """Whether a user needs nothing of a node but its shape."""
    return user.target in SHAPE_ONLY or (user.target is aten.view_as.default and user.args[0] is not node)


def rotation_block(rotation: fx.Node) -> int:
    """Width of a rotation's block."""
    block = 1
    for matrix in rotation.args[1:]:
        assert isinstance(matrix, fx.Node)
        block *= matrix.meta["val"].shape[0]
    return block


def weight_name(node: fx.Node) -> str:
    """The parameter that a linear multiplies with.

    Raises:
        Unproven: it is no parameter.
    """
    weight = weight_node(node)
    if weight is None:
        raise Unproven(f"{described(node)} multiplies with no parameter")
    return str(weight.target)


def bias_name(node: fx.Node) -> str | None:
    """The parameter that a linear adds, if it adds one.

    Raises:
        Unproven: what it adds is no parameter.
    """
    bias = node.args[2] if node.target is LINEAR and len(node.args) > 2 else node.kwargs.get("bias")
    if bias is None:
        return None
    if not isinstance(bias, fx.Node) or bias.op != "get_attr":
        raise Unproven(f"{described(node)} adds what is no parameter")
    return str(bias.target)


def read_only_by(node: fx.Node, reader: fx.Node) -> None:
    """Check that nothing else reads a value.

    Raises:
        Unproven: something does.
    """
    others = [user for user in node.users if user is not reader and not only_shape(user, node)]
    if others:
        raise Unproven(f"{described(others[0])} reads the output of {described(node)} as well")
