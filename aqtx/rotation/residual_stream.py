"""The residual stream of a decoder, found by walking the graph; what is not proven is refused.

embedding -> r0 -> r1 = r0 + w1 -> r2 = r1 + w2 ... -> norm -> lm_head
              |            ^                                (readers: linears behind each norm)
              norm -> ... -> linear                         (writers: linears and biases before each sum)
"""

from dataclasses import dataclass, field

from torch import fx

from aqtx.rotation.row_ops import (
    Unproven,
    aten,
    described,
    is_inserted,
    is_linear,
    is_rowwise,
    only_shape,
    read_only_by,
    width,
)

NORM = aten.rms_norm.default
CASTS = (aten.to.dtype, aten._to_copy.default)


def readers(node: fx.Node) -> list[fx.Node]:
    """The linears that read a value, through rowwise ops and rotations.

    Raises:
        Unproven: something else reads it.
    """
    found: list[fx.Node] = []
    for user in node.users:
        if is_linear(user) and user.args[0] is node:
            found.append(user)
        elif is_inserted(user) or (not only_shape(user, node) and is_rowwise(user, node)):
            found += readers(user)
        elif not only_shape(user, node):
            raise Unproven(f"{described(user)} reads it, which is no linear")
    return list(dict.fromkeys(found))


def writers(node: fx.Node, reader: fx.Node) -> list[fx.Node]:
    """The linears and parameters (biases) whose sum, through rowwise ops, a value is that only `reader` reads.

    Raises:
        Unproven: something else takes part in it, or reads it.
    """
    read_only_by(node, reader)
    if is_linear(node) or node.op == "get_attr":
        return [node]
    sources = [source for source in node.all_input_nodes if width(source) == width(node)]
    if is_sum(node):
        return list(dict.fromkeys(writer for source in sources for writer in writers(source, node)))
    for source in sources:
        first = node.args[0] is source or node.target is aten.mul.Tensor
        if first and is_rowwise(node, source):
            return writers(source, node)
    raise Unproven(f"{described(node)} takes part in what is added to the residual stream")


def is_sum(node: fx.Node) -> bool:
    """Whether a node adds two values of one width."""
    both = all(isinstance(value, fx.Node) and width(value) == width(node) for value in node.args[:2])
    return node.target is aten.add.Tensor and both and "alpha" not in node.kwargs


@dataclass
class Stream:
    """The residual stream: where it comes from, what reads it behind which norm, what writes to it."""

    embedding: fx.Node
    width: int
    norms: list[fx.Node] = field(default_factory=list)
    writers: list[fx.Node] = field(default_factory=list)

    @property
    def readers(self) -> list[fx.Node]:
        """The linears behind the norms."""
        return [reader for norm in self.norms for reader in readers(norm)]


def residual_stream(graph: fx.Graph) -> Stream:
    """Follow the stream from the embedding to the last norm.

    Raises:
        Unproven: something reads or writes it in a way that is not known to commute with a rotation.
    """
    embeddings = [node for node in graph.nodes if node.target is aten.embedding.default]
    if len(embeddings) != 1:
        raise Unproven(f"the graph has {len(embeddings)} embeddings, and the residual stream starts at one")
    size = width(embeddings[0])
    assert size is not None
    stream = Stream(embeddings[0], size)
    trunk = [embeddings[0]]
    for node in trunk:  # grows on the way
        for user in node.users:
            _meet(stream, user, node, trunk)
    return stream


def _meet(stream: Stream, user: fx.Node, node: fx.Node, trunk: list[fx.Node]) -> None:
    """Take a user of the stream into account."""
    if user in trunk or only_shape(user, node):
        return
    if user.target is NORM and user.args[1] == [stream.width]:
        stream.norms.append(user)
    elif is_sum(user):
        trunk.append(user)
        for other in user.all_input_nodes:
            if other not in trunk:
                stream.writers += [writer for writer in writers(other, user) if writer not in stream.writers]
    elif is_rowwise(user, node):
        trunk.append(user)
    else:
        raise Unproven(f"{described(user)} reads the residual stream")


@dataclass(frozen=True)
class Gain:
    """What a norm multiplies by: a parameter, plus a number where the checkpoint stores the gain less one."""

    node: fx.Node  # the parameter's
    offset: float

    @property
    def name(self) -> str:
        """The parameter's name."""
        return str(self.node.target)


def gain_of(norm: fx.Node) -> Gain | None:
    """The gain of a norm, None where it has none.

    Raises:
        Unproven: it is computed from more than a parameter and a number.
    """
    found = norm.args[2] if len(norm.args) > 2 else None
    if not isinstance(found, fx.Node):
        return None
    if found.op == "get_attr":
        return Gain(found, 0.0)
    if found.target is aten.add.Tensor and len(found.args) == 2 and len(found.users) == 1:
        value, number = found.args
        parameter = before_cast(value) if isinstance(value, fx.Node) else value
        if isinstance(parameter, fx.Node) and parameter.op == "get_attr" and isinstance(number, int | float):
            return Gain(parameter, float(number))
    raise Unproven(f"the gain of {norm.name} is computed ({described(found)})")


def before_cast(node: fx.Node) -> fx.Node:
    """What a cast that nothing else reads was made of; the node itself where it is none."""
    source = node.args[0] if node.target in CASTS and len(node.users) == 1 else node
    assert isinstance(source, fx.Node)
    return source
