"""Rotations that move into weights: what must be changed for one to vanish from the graph."""

from dataclasses import dataclass, field

from torch import fx

from aqtx.program.edits import Hadamard, RemoveHadamard, nodes_reading
from aqtx.program.program import Program
from aqtx.program.weight_changes import Rotate
from aqtx.rotation.attention_path import value_writer
from aqtx.rotation.residual_stream import Stream, gain_of
from aqtx.rotation.row_ops import Unproven, bias_name, weight_name
from aqtx.rotation.select import input_rotation


@dataclass
class Fusion:
    """Weights to change, and the linears whose rotation then goes."""

    kind: str
    readers: list[str] = field(default_factory=list)
    changes: dict[str, Rotate] = field(default_factory=dict)

    def write_rotated(self, writer: fx.Node, rotation: Rotate) -> None:
        """Rotate what a linear writes, bias included."""
        self.changes[weight_name(writer)] = Rotate(rotation.block, rotation.seed, outputs=True)
        bias = bias_name(writer)
        if bias is not None:
            self.changes[bias] = Rotate(rotation.block, rotation.seed, outputs=True)

    def edits(self) -> list[RemoveHadamard]:
        """What removes the nodes once the weights are changed."""
        return [RemoveHadamard(weight=reader) for reader in self.readers]


def fuse_stream(program: Program, stream: Stream) -> Fusion:
    """The rotation of the whole residual stream.

    Raises:
        Unproven: a reader has no rotation or another one, a norm has a gain, or a weight has a second use.
    """
    readers = stream.readers
    rotations = {reader: recorded_rotation(program, reader) for reader in readers}
    [first, *others] = dict.fromkeys(rotations.values())
    if others or first is None:
        odd = next(reader for reader in readers if rotations[reader] is None or rotations[reader] != first)
        raise Unproven(f"{weight_name(odd)} reads the residual stream without the same rotation")
    for norm in stream.norms:
        gain = gain_of(norm)
        if gain is not None and not bool((program.weights.precise(gain.name) + gain.offset == 1).all()):
            raise Unproven(f"{gain.name} is a gain between the stream and the rotation: run `fold_norms` first")
    fusion = Fusion("residual", [weight_name(reader) for reader in readers])
    embedding = stream.embedding.args[0]
    if not isinstance(embedding, fx.Node) or embedding.op != "get_attr" or len(embedding.users) > 1:
        raise Unproven("the embedding's weights have a second use: untie them first")
    fusion.changes[str(embedding.target)] = first
    for writer in stream.writers:
        if writer.op == "get_attr":  # the biases of experts, a row each
            _single_parameter(program, writer)
            fusion.changes[str(writer.target)] = first
            continue
        _single_use(program, writer)
        fusion.write_rotated(writer, first)
    for reader in readers:
        _single_use(program, reader)
    return fusion


def fuse_heads(program: Program, reader: fx.Node) -> Fusion:
    """The rotation of attention's output, moved through attention into v.

    Raises:
        Unproven: the way to v is not proven, or a weight has a second use.
    """
    rotation, node = recorded_rotation(program, reader), input_rotation(reader)
    if rotation is None or node is None:
        raise Unproven("the rotation is not one that an edit recorded")
    writer = value_writer(node, rotation.block)
    _single_use(program, writer)
    _single_use(program, reader)
    fusion = Fusion("heads", [weight_name(reader)])
    fusion.write_rotated(writer, rotation)
    return fusion


def recorded_rotation(program: Program, reader: fx.Node) -> Rotate | None:
    """The rotation on a linear's input, as its edit describes it."""
    if input_rotation(reader) is None:
        return None
    weight = weight_name(reader)
    edits = [edit for edit in program.edits if isinstance(edit, Hadamard) and edit.weight == weight]
    return Rotate(edits[-1].block, edits[-1].seed) if edits else None


def _single_parameter(program: Program, node: fx.Node) -> None:
    """Check that a value which joins the stream is a parameter that nothing else reads.

    Raises:
        Unproven: it is a buffer, or has a second use.
    """
    if node.target not in program.weights.specs:
        raise Unproven(f"{node.target} takes part in what is added to the residual stream, and is no parameter")
    if nodes_reading(program.graph, str(node.target)) or len(node.users) > 1:
        raise Unproven(f"{node.target} is used by several nodes")


def _single_use(program: Program, node: fx.Node) -> None:
    """Check that a linear's weight is read by no other node.

    Raises:
        Unproven: it is.
    """
    weight = weight_name(node)
    if len(nodes_reading(program.graph, weight)) > 1 or len(node.args[1].users) > 1:  # type: ignore[union-attr]
        raise Unproven(f"{weight} is used by several nodes")
