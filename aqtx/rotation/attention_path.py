"""The way from v to o: attention mixes positions, so a head's values may be rotated before it or after it.

x -> v_proj -> heads -> attention -> heads joined -> rotation -> o_proj
"""

from torch import fx

from aqtx.program.site import LINEAR
from aqtx.rotation.row_ops import Unproven, aten, described, is_rowwise, read_only_by, width

ATTENTION = aten.scaled_dot_product_attention.default
_RESHAPES = (aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int)
_MOVES = (aten.transpose.int, aten.contiguous.default, aten.clone.default, aten.expand.default, aten.unsqueeze.default)


def value_writer(reader: fx.Node, block: int) -> fx.Node:
    """The linear of the values that attention mixes and hands to a reader: v, for o or a rotation before it.

    Blocks of a rotation must lie within heads, and all heads are rotated alike, also where several
    query heads share one head of values.

    Raises:
        Unproven: the reader's input is not attention's output, or the way to v is not proven.
    """
    mixed = _back_to(reader, 0, (ATTENTION,), block)
    head = width(mixed)
    if head is None or head % block:
        raise Unproven(f"a block of {block} does not lie within a head of {head}")
    return _back_to(mixed, 2, (LINEAR,), block)


def _back_to(reader: fx.Node, place: int, targets: tuple[object, ...], block: int) -> fx.Node:
    """Walk back from an argument of `reader` to a node of `targets` over ops that move whole blocks."""
    node = reader.args[place]
    while isinstance(node, fx.Node):
        read_only_by(node, reader)
        if node.target in targets:
            return node
        source = node.args[3] if node.target is aten.index_copy_.default else node.args[0] if node.args else None
        if isinstance(source, fx.Node) and node.target in _RESHAPES and not moves_blocks(node, source, block):
            raise Unproven(f"a block of {block} does not lie in the {width(source)} columns before {described(node)}")
        if not isinstance(source, fx.Node) or not moves_blocks(node, source, block):
            raise Unproven(f"{described(node)} stands between the rotation and the linear before it")
        reader, node = node, source
    raise Unproven(f"{described(reader)} has no input to walk back to")


def moves_blocks(node: fx.Node, source: fx.Node, block: int) -> bool:
    """Whether an op leaves runs of `block` neighbours of the last dimension together and in order."""
    before, after = width(source), width(node)
    if node.target in _RESHAPES:
        return before is not None and after is not None and before % block == 0 and after % block == 0
    if node.target is aten.index_copy_.default:
        rank = len(node.meta["val"].shape)
        return isinstance(node.args[1], int) and node.args[1] % rank != rank - 1
    return node.target in _MOVES and before == after and is_rowwise(node, source)
