"""`annotate_hessian`: errors weighted by how strong the inputs are, and how often experts are asked."""

from dataclasses import dataclass

from aqtx.program.program import Program
from aqtx.program.site import Site
from aqtx.registry import Changes, Context, Walks, register
from aqtx.sensitivity.by_format import ByFormat, annotated
from aqtx.sensitivity.inputs import measure_inputs


@register("annotate_hessian")
@dataclass(frozen=True, kw_only=True)
class AnnotateHessian(ByFormat):
    """Annotate every matrix with what calibration text says of its inputs.

    The error of each format is weighted by the mean square of each input channel; experts get their frequency and
    their summed gate scores. One block is resident at a time.

    site -> site{hessian: {mxfp4: 0.52, ...}, frequency: 0.25, gate_weight: 0.06}
    """

    annotates = ("hessian", "frequency", "gate_weight")

    def walks(self) -> tuple[Walks, int | None]:
        """Block by block."""
        return "forward", None

    def apply(self, program: Program, sites: list[Site], context: Context) -> Changes:
        """Measure; the values go into the details by site."""
        measure_inputs(program, self.wanted(sites), context)
        return annotated(sites, "hessian", "frequency", "gate_weight")
