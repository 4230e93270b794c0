"""`unfreeze`: say which of the weights that stay unquantized `distill` may train."""

from dataclasses import dataclass

from aqtx.finetune.parts import Part, sites_of_parts, vectors_of_parts
from aqtx.program.program import Program
from aqtx.program.site import Site
from aqtx.registry import Changes, Context, Pass, register


@register("unfreeze")
@dataclass(frozen=True, kw_only=True)
class Unfreeze(Pass):
    """Mark parts of the model as trainable; everything else stays as it is, byte for byte.

    Fields:
        what: any of `router`, `norm` (gains of all norms), `attention` (its matrices), `bias` (those of linears).
    """

    stage = "train"

    what: tuple[Part, ...] = ("router", "norm")

    def validate(self) -> list[str]:
        """Something must train."""
        return [] if self.what else ["what names no part to train: router, norm, attention or bias"]

    def misfits(self, program: Program) -> list[str]:
        """Parts that the model does not have."""
        return [
            f"what: this model has no {part} to train"
            for part in self.what
            if not sites_of_parts(program, [part]) and not vectors_of_parts(program, [part])
        ]

    def find(self, program: Program) -> list[Site]:
        """The matrices among the parts."""
        return sites_of_parts(program, self.what)

    def refuse(self, program: Program, site: Site) -> str | None:
        """A matrix that the plan quantized has no weights left to train."""
        fmt = site.get("format")
        return None if fmt is None else f"the plan gives it the format {fmt}; `keep` it in `assign_plan` to train it"

    def apply(self, program: Program, sites: list[Site], context: Context) -> Changes:
        """Remember the names."""
        names = list(dict.fromkeys([*(site.weight for site in sites), *vectors_of_parts(program, self.what)]))
        program.trainable = list(dict.fromkeys([*program.trainable, *names]))
        numel = sum(program.weights.specs[name].numel for name in names)
        return Changes(changed=[name.removesuffix(".weight") for name in names], details={"parameters": numel})
