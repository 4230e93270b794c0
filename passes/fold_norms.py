"""`fold_norms`: multiply the gain of each RMS norm into the linears that read it."""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import fx

from aqtx.program.program import Program
from aqtx.program.site import Site
from aqtx.program.weight_changes import Scale
from aqtx.registry import Changes, Context, Pass, Refusal, register
from aqtx.rotation.residual_stream import NORM, Gain, before_cast, gain_of, readers
from aqtx.rotation.row_ops import Unproven, aten, weight_name
from aqtx.rotation.select import check_plain, input_rotation


@register("fold_norms")
@dataclass(frozen=True, kw_only=True)
class FoldNorms(Pass):
    """Fold gains into readers, router and head included, so that norms commute with rotations.

    norm(x) * g -> linear(., W)        becomes        norm(x) * 1 -> linear(., W diag(g))

    A norm whose output something other than linears reads is refused: q/k norms before rotary positions,
    norms behind a block, whose output joins the residual stream. A LayerNorm is never folded: it
    subtracts the mean, which a rotation changes.

    Fields:
        untie: give a head that shares the embedding's weights its own, where the last norm folds into it.
    """

    stage = "rotate"
    exact = True

    untie: bool = True

    def find(self, program: Program) -> list[Site]:
        """None: the pass is about norms; the readers that it changes are told as changed."""
        return []

    def apply(self, program: Program, sites: list[Site], context: Context) -> Changes:
        """Prove all, then fold."""
        changes, plan = Changes(), dict[Gain, list[str]]()
        tied = set() if self.untie else set(program.weights.shared())
        for node in program.graph.nodes:
            try:
                if node.target in (NORM, aten.layer_norm.default):
                    gain, weights = folding(node, tied)
                    plan[gain] = weights
            except Unproven as reason:
                changes.refused.append(Refusal(norm_name(node), f"its gain cannot be folded: {reason}"))
        _refuse_shared(plan, changes)
        check_plain(program, {weight for weights in plan.values() for weight in weights})
        for gain, weights in plan.items():
            scale = Scale(program.weights.precise(gain.name, dtype=torch.float64) + gain.offset)
            for weight in weights:
                program.weights.change(weight, scale)
            program.weights.put(gain.name, torch.full_like(scale.vector, 1 - gain.offset, dtype=program.dtype))
            changes.changed += weights
        changes.details = {"norms": len(plan)}
        return changes


def folding(node: fx.Node, tied: set[str]) -> tuple[Gain, list[str]]:
    """A norm's gain and the weights that it folds into.

    Raises:
        Unproven: it cannot be folded.
    """
    if node.target is not NORM:
        raise Unproven("it is a LayerNorm, which subtracts the mean")
    gain = gain_of(node)
    if gain is None:
        raise Unproven("it has none of its own")
    if len(gain.node.users) > 1:
        raise Unproven("several nodes use it")
    found = readers(node)
    if rotated := [weight_name(reader) for reader in found if input_rotation(reader) is not None]:
        raise Unproven(f"a rotation runs before {rotated[0]}; `fold_norms` goes before `insert_hadamard`")
    weights = [weight_name(reader) for reader in found]
    if set(weights) & tied:
        raise Unproven("its reader shares the embedding's weights and `untie` is off")
    return gain, list(dict.fromkeys(weights))


def norm_name(node: fx.Node) -> str:
    """What a refusal calls a norm: its gain's parameter."""
    found = [source for argument in node.args[2:3] if isinstance(argument, fx.Node) for source in sources(argument)]
    return str(found[0].target) if found else node.name


def sources(gain: fx.Node) -> list[fx.Node]:
    """The parameters that a gain is computed from."""
    return [node for node in (gain, *map(before_cast, gain.all_input_nodes)) if node.op == "get_attr"]


def _refuse_shared(plan: dict[Gain, list[str]], changes: Changes) -> None:
    """Drop norms that would fold into one weight."""
    count = Counter(weight for weights in plan.values() for weight in weights)
    for gain in [gain for gain, weights in plan.items() if any(count[weight] > 1 for weight in weights)]:
        del plan[gain]
        why = "its gain cannot be folded: a weight behind it is read behind another norm too"
        changes.refused.append(Refusal(gain.name, why))
