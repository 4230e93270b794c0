"""`annotate_fisher`: the divergence that gradients on calibration text predict."""

from dataclasses import dataclass

from aqtx.program.program import Program
from aqtx.program.site import Site
from aqtx.registry import Changes, Context, Walks, register
from aqtx.sensitivity.by_format import ByFormatOnText, annotated
from aqtx.sensitivity.fisher import KEYS, Detail, measure_fisher


@register("annotate_fisher")
@dataclass(frozen=True, kw_only=True)
class AnnotateFisher(ByFormatOnText):
    """Annotate every matrix with the divergence that Fisher information predicts for each format, in nats per token.

    One backward pass per sequence; one block is resident at a time.

    site -> site{fisher: {mxfp4: 1.2e-05, ...}}

    Fields:
        detail: `direction` along each format's rounding error; of the diagonal alone `element`, or its mean `matrix`.
    """

    annotates = tuple(KEYS.values())

    num_sequences: int = 64
    detail: Detail = "direction"

    def walks(self) -> tuple[Walks, int | None]:
        """Forward and back."""
        return "backward", self.num_sequences

    def apply(self, program: Program, sites: list[Site], context: Context) -> Changes:
        """Measure; the values go into the details by site."""
        measure_fisher(program, self.wanted(sites), context, num_sequences=self.num_sequences, detail=self.detail)
        return annotated(sites, KEYS[self.detail])
