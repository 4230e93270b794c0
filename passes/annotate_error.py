"""`annotate_error`: the measured error of each format on each weight matrix."""

from dataclasses import dataclass

from aqtx.formats import parse
from aqtx.numerics.error import qsnr
from aqtx.program import Program, Site
from aqtx.registry import Changes, Context, Pass, register
from aqtx.sensitivity.measured import measure, requests
from aqtx.sensitivity.selection import format_problems, selected_sites


@register("annotate_error")
@dataclass(frozen=True, kw_only=True)
class AnnotateError(Pass):
    """Annotate every matrix with the error that each format makes on it when rounded to nearest.

    site -> site{error: {mxfp4: 0.0132, ...}, energy: ||W||^2}

    Fields:
        formats: the formats to try.
        sites: category names or patterns of the matrices to look at.
    """

    formats: tuple[str, ...] = ("mxfp4", "mxfp6", "mxfp8")
    sites: tuple[str, ...] = ("*",)

    def validate(self) -> list[str]:
        """The format names."""
        return format_problems(self.formats, "formats")

    def find(self, program: Program) -> list[Site]:
        """The selected sites; one that is used twice is looked at once."""
        return selected_sites(program, self.sites, "sites")

    def apply(self, program: Program, sites: list[Site], context: Context) -> Changes:
        """Measure; the mean QSNR of each format goes into the details."""
        formats = [parse(name) for name in self.formats]
        measure(program, context.progress(requests(sites, formats), description="annotate_error"))
        mean = {fmt.name: sum(site.get("error")[fmt.name] for site in sites) / max(len(sites), 1) for fmt in formats}
        details = {
            "qsnr_db": {name: round(qsnr(error, 1.0), 3) if error > 0 else None for name, error in mean.items()},
            "sites": [{"site": site.name, "errors": site.get("error")} for site in sites],
        }
        return Changes(changed=[site.name for site in sites], details=details)
