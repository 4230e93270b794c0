"""`annotate_error`: the measured error of each format on each weight matrix."""

from dataclasses import dataclass

from aqtx.formats import parse
from aqtx.numerics.error import qsnr
from aqtx.program.program import Program
from aqtx.program.site import Site
from aqtx.registry import Changes, Context, register
from aqtx.sensitivity.by_format import ByFormat
from aqtx.sensitivity.measured import measure


@register("annotate_error")
@dataclass(frozen=True, kw_only=True)
class AnnotateError(ByFormat):
    """Annotate every matrix with the error that each format makes on it when rounded to nearest.

    site -> site{error: {mxfp4: 0.0132, ...}, energy: ||W||^2}
    """

    annotates = ("error", "energy")

    def apply(self, program: Program, sites: list[Site], context: Context) -> Changes:
        """Measure; the mean QSNR of each format goes into the details."""
        measure(program, context.progress(self.wanted(sites), description="annotate_error"))
        names = [parse(name).name for name in self.formats]
        mean = {name: sum(site.get("error")[name] for site in sites) / max(len(sites), 1) for name in names}
        details = {
            "qsnr_db": {name: round(qsnr(error, 1.0), 3) if error > 0 else None for name, error in mean.items()},
            "sites": [{"site": site.name, "errors": site.get("error")} for site in sites],
        }
        return Changes(changed=[site.name for site in sites], details=details)
