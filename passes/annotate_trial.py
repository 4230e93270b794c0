"""`annotate_trial`: what happens when one matrix alone is rounded."""

from dataclasses import dataclass
from typing import Literal

from aqtx.program.program import Program
from aqtx.program.site import Site
from aqtx.registry import Changes, Context, Walks, register
from aqtx.sensitivity.by_format import ByFormatOnText, annotated
from aqtx.sensitivity.trial import KEYS, measure_trials


@register("annotate_trial")
@dataclass(frozen=True, kw_only=True)
class AnnotateTrial(ByFormatOnText):
    """Annotate every matrix with the change that rounding it alone makes on calibration text.

    The change is that of its block's output, or the divergence of the model's predictions.

    site -> site{trial: {mxfp4: 0.0031}}   or, with measure: loss, site{trial_loss: {mxfp4: 4.1e-05}}

    Fields:
        measure: `block` relative squared change of the block's output, `loss` divergence of logits in nats a token.
    """

    annotates = tuple(KEYS.values())

    measure: Literal["block", "loss"] = "block"

    def walks(self) -> tuple[Walks, int | None]:
        """Block by block, every trial."""
        return "trials", self.num_sequences

    def apply(self, program: Program, sites: list[Site], context: Context) -> Changes:
        """Measure; the values go into the details by site."""
        measure_trials(program, self.wanted(sites), context, measure=self.measure, num_sequences=self.num_sequences)
        return annotated(sites, KEYS[self.measure])
