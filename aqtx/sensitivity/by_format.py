"""The options that annotating passes share: which formats to try, on which matrices, and on how much text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from aqtx.formats import parse
from aqtx.program.program import Program
from aqtx.program.site import Site
from aqtx.registry import Changes, Pass
from aqtx.sensitivity.measured import Request, requests
from aqtx.sensitivity.selection import format_problems, selected_sites


@dataclass(frozen=True, kw_only=True)
class ByFormat(Pass):
    """Annotates matrices with a value for each format.

    Fields:
        formats: the formats to try.
        sites: category names or patterns of the matrices to look at.
    """

    stage = "annotate"

    formats: tuple[str, ...] = ("mxfp4", "mxfp6", "mxfp8")
    sites: tuple[str, ...] = ("*",)

    def validate(self) -> list[str]:
        """The format names."""
        return format_problems(self.formats, "formats")

    def find(self, program: Program) -> list[Site]:
        """The selected sites; one that is used twice is looked at once."""
        return selected_sites(program, self.sites, "sites")

    def wanted(self, sites: Sequence[Site]) -> list[Request]:
        """Every site with every format."""
        return requests(sites, [parse(name) for name in self.formats])


@dataclass(frozen=True, kw_only=True)
class ByFormatOnText(ByFormat):
    """Annotates from some of the calibration sequences.

    Fields:
        num_sequences: calibration sequences to run.
    """

    num_sequences: int = 4

    def validate(self) -> list[str]:
        """The format names and the count."""
        return super().validate() + (["num_sequences is below 1."] if self.num_sequences < 1 else [])


def annotated(sites: Sequence[Site], *keys: str) -> Changes:
    """All sites changed; what they were annotated with under the keys goes into the details."""
    rows: list[dict[str, Any]] = [{"site": site.name, **{key: site.get(key) for key in keys}} for site in sites]
    return Changes(changed=[site.name for site in sites], details={"sites": rows})
