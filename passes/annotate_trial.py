"""`annotate_trial`: what happens when one matrix alone is rounded."""

from dataclasses import dataclass
from typing import Literal

from aqtx.formats import parse
from aqtx.program import Program, Site
from aqtx.registry import Changes, Context, Pass, register
from aqtx.sensitivity.measured import requests
from aqtx.sensitivity.selection import format_problems, selected_sites
from aqtx.sensitivity.trial import KEYS, measure_trials


@register("annotate_trial")
@dataclass(frozen=True, kw_only=True)
class AnnotateTrial(Pass):
    """Annotate every matrix with the change that rounding it alone makes on calibration text.

    The change is that of its block's output, or the divergence of the model's predictions. The whole model is resident.

    site -> site{trial: {mxfp4: 0.0031}}   or, with measure: loss, site{trial_loss: {mxfp4: 4.1e-05}}

    Fields:
        formats: the formats to try.
        sites: category names or patterns of the matrices to look at.
        measure: `block` relative squared change of the block's output, `loss` divergence of logits in nats a token.
        num_sequences: calibration sequences to run.
    """

    formats: tuple[str, ...] = ("mxfp4", "mxfp6", "mxfp8")
    sites: tuple[str, ...] = ("*",)
    measure: Literal["block", "loss"] = "block"
    num_sequences: int = 4

    def validate(self) -> list[str]:
        """The format names and the count."""
        few = ["num_sequences is below 1."] if self.num_sequences < 1 else []
        return format_problems(self.formats, "formats") + few

    def find(self, program: Program) -> list[Site]:
        """The selected sites; one that is used twice is looked at once."""
        return selected_sites(program, self.sites, "sites")

    def apply(self, program: Program, sites: list[Site], context: Context) -> Changes:
        """Measure; the values go into the details by site."""
        wanted = requests(sites, [parse(name) for name in self.formats])
        measure_trials(program, wanted, context, measure=self.measure, num_sequences=self.num_sequences)
        key = KEYS[self.measure]
        details = {"sites": [{"site": site.name, key: site.get(key)} for site in sites]}
        return Changes(changed=[site.name for site in sites], details=details)
