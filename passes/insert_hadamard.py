"""`insert_hadamard`: rotate the inputs of linears, and their weights against it."""

from dataclasses import dataclass
from typing import Any, Literal

from aqtx.errors import InputError, problems_of
from aqtx.numerics.hadamard import is_order
from aqtx.program.edits import Hadamard
from aqtx.program.program import Program
from aqtx.program.site import Site
from aqtx.program.weight_changes import Rotate
from aqtx.registry import Changes, Context, Pass, Refusal, register
from aqtx.rotation.select import check_plain, input_rotation, select_named, select_sites


@register("insert_hadamard")
@dataclass(frozen=True, kw_only=True)
class InsertHadamard(Pass):
    """Put a Hadamard rotation before linears. Exact anywhere, since Q Q^T = I.

    x -> linear(., W)        becomes        x -> hadamard -> linear(., W Q)

    Outliers of the input and of the weight's columns spread over their block. `fuse_hadamard` then
    moves into the weights before it whatever it can prove; the rest stays one node that runs.

    Fields:
        before: categories, groups and patterns of sites; `residual` means every reader of the residual stream (with
            `fold_norms` before and `fuse_hadamard` after, the rotation called R1), `attn_o` with block `head` is R2;
            `plan` the sites whose plan asks for a rotation, with the plan's block.
        block: width of a block: a number, `full`, or `head` for the size of an attention head.
        signs: draw random signs for the rotation's rows.
        seed: of the signs; default the recipe's.
        untie: give a head that shares the embedding's weights its own, where it is rotated.
    """

    stage = "rotate"
    exact = True

    before: tuple[str, ...] = ("mlp_down",)
    block: int | Literal["full", "head"] = 32
    signs: bool = True
    seed: int | None = None
    untie: bool = True

    def validate(self) -> list[str]:
        """The block's order and the seed."""
        problems = []
        if isinstance(self.block, int) and (self.block < 2 or not is_order(self.block)):
            problems.append(f"block: no Hadamard matrix of order {self.block} is known; take 16 to 128, full or head")
        if not self.before:
            problems.append("before: names no site")
        if self.seed is not None and self.seed < 0:
            problems.append(f"seed: must be 0 or more, got {self.seed}")
        return problems

    def misfits(self, program: Program) -> list[str]:
        """Selectors without a match."""
        return problems_of(lambda: select_named(program, self.before))

    def find(self, program: Program) -> list[Site]:
        """The selected sites."""
        return select_sites(program, self.before)

    def refuse(self, program: Program, site: Site) -> str | None:
        """Widths that the block does not divide, inputs that are rotated already, shared weights."""
        block = self._block(program, site)
        if site.shape[1] % block:
            fitting = [width for width in (128, 64, 32, 16) if site.shape[1] % width == 0]
            return f"a block of {block} does not divide {site.shape[1]} inputs; of 16 to 128 {fitting or 'none'} does"
        if not is_order(block):
            return f"no Hadamard matrix of order {block} is known"
        if input_rotation(site.node) is not None:
            return "its input is rotated already"
        if not self.untie and site.weight in program.weights.shared():
            return "it shares the embedding's weights and `untie` is off"
        return None

    def apply(self, program: Program, sites: list[Site], context: Context) -> Changes:
        """Rotate weight by weight; all experts of a stack share one input and so one rotation."""
        weights: dict[str, list[Site]] = {}
        for site in sites:
            weights.setdefault(site.weight, []).append(site)
        partial = [name for name, members in weights.items() if len(members) < members[0].slots]
        changes = Changes(refused=[_partial(site) for name in partial for site in weights.pop(name)])
        check_plain(program, weights)
        seed = None if not self.signs else context.seed if self.seed is None else self.seed
        edits: list[Hadamard] = []
        for name, members in weights.items():
            block = self._block(program, members[0])
            program.weights.change(name, Rotate(block, seed))
            edits.append(Hadamard(weight=name, block=block, seed=seed))
            changes.changed += [site.name for site in members]
        program.edit(*edits)
        changes.details = {"weights": len(weights)}
        return changes

    def _block(self, program: Program, site: Site) -> int:
        planned: dict[str, Any] | None = site.get("rotation") if "plan" in self.before else None
        if planned is not None:
            return int(planned["block"])
        if self.block == "full":
            return site.shape[1]
        return head_size(program) if self.block == "head" else self.block


def head_size(program: Program) -> int:
    """Size of an attention head by config.json.

    Raises:
        InputError: config.json does not tell it.
    """
    config = program.config
    if "num_attention_heads" not in config or "hidden_size" not in config:
        raise InputError("block: config.json tells no head size; give the block as a number")
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _partial(site: Site) -> Refusal:
    return Refusal(site.name, f"the experts of {site.weight} share one input: select all of them or none")
