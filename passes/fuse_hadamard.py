"""`fuse_hadamard`: move rotations from the inputs of linears into the weights before them."""

from collections import Counter
from dataclasses import dataclass

from torch import fx

from aqtx.program.program import Program
from aqtx.program.site import Site
from aqtx.registry import Changes, Context, Pass, Refusal, register
from aqtx.rotation.fusion import Fusion, fuse_heads, fuse_stream
from aqtx.rotation.residual_stream import residual_stream
from aqtx.rotation.row_ops import Unproven, is_hadamard, weight_name
from aqtx.rotation.select import check_plain, input_rotation


@register("fuse_hadamard")
@dataclass(frozen=True, kw_only=True)
class FuseHadamard(Pass):
    """Fuse what can be proven to commute; what cannot stays one node, with the reason.

    The residual stream (R1), when all its readers are rotated alike and the norms have no gains:
        embedding, writers -> stream -> norm -> hadamard -> readers
        becomes            embedding Q, Q^T writers -> stream -> norm -> readers
    A head's values (R2):  v -> attention -> hadamard -> o        becomes        Q^T v -> attention -> o
    """

    stage = "rotate"
    exact = True

    def find(self, program: Program) -> list[Site]:
        """The sites whose inputs are rotated by a node."""
        return [site for site in program.sites() if input_rotation(site.node) is not None]

    def apply(self, program: Program, sites: list[Site], context: Context) -> Changes:
        """Prove all, then fuse."""
        changes, rotated = Changes(), list(dict.fromkeys(site.node for site in sites))
        fusions, reasons = _plan(program, rotated)
        check_plain(program, {name for fusion in fusions for name in fusion.changes})
        for fusion in fusions:
            for name, change in fusion.changes.items():
                program.weights.change(name, change)
            changes.changed += fusion.readers
        program.edit(*(edit for fusion in fusions for edit in fusion.edits()))
        left = [node for node in program.graph.nodes if is_hadamard(node)]
        for node in rotated:
            if input_rotation(node) is not None:
                place, why = f"hadamard before {weight_name(node)}", f"stays a node: {reasons[node]}"
                changes.refused.append(Refusal(place, why))
        fused = Counter(dict.fromkeys(("residual", "heads"), 0))
        for fusion in fusions:
            fused[fusion.kind] += len(fusion.readers)
        changes.details = {"fused": dict(fused), "online_nodes": len(left)}
        return changes


def _plan(program: Program, rotated: list[fx.Node]) -> tuple[list[Fusion], dict[fx.Node, str]]:
    """What can be fused, and why the rest cannot, by linear."""
    fusions: list[Fusion] = []
    reasons: dict[fx.Node, str] = {}
    on_stream: set[fx.Node] = set()
    try:
        stream = residual_stream(program.graph)
        on_stream = set(stream.readers) & set(rotated)
        if on_stream:
            fusions.append(fuse_stream(program, stream))
    except Unproven as reason:
        reasons.update(dict.fromkeys(rotated, str(reason)))
    for node in rotated:
        if node not in on_stream:
            try:
                fusions.append(fuse_heads(program, node))
            except Unproven as reason:
                reasons[node] = str(reason)
    return fusions, reasons
