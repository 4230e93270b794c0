"""`annotate_alpha`: how heavy-tailed each weight matrix's spectrum is."""

from dataclasses import dataclass
from typing import Literal

from aqtx.numerics.alpha import check_options
from aqtx.program.program import Program
from aqtx.program.site import Site
from aqtx.registry import Changes, Context, Pass, register
from aqtx.sensitivity.alpha import AlphaOptions, alpha_after_csv, alpha_csv, measure_alpha
from aqtx.sensitivity.selection import selected_sites


@register("annotate_alpha")
@dataclass(frozen=True, kw_only=True)
class AnnotateAlpha(Pass):
    """Annotate every matrix with its alpha (PL_Alpha_Hill); one matrix is in memory at a time.

    site -> site{alpha: 3.2, alpha_info: {k_used, n_eigs, method, reason, raw}}

    A degenerate matrix (zeros, one row, equal eigenvalues) gets no alpha but a reason, and is reported.

    Fields:
        spectra: `farms` pools blocks of one aspect ratio, so that shapes are comparable; `full` takes all eigenvalues.
        k_fraction: share of the eigenvalues in the tail.
        threshold: where the tail begins: `k_fraction`, `xmin_mid`, `xmin_peak` or `ks`.
        precise: singular values in float64 throughout; about six times slower.
        raw: beside a FARMS alpha, also take that of the full spectrum.
        sites: category names or patterns of the matrices to look at.
    """

    stage = "annotate"
    matrix_copies = 2
    annotates = ("alpha", "alpha_info")

    spectra: Literal["farms", "full"] = "farms"
    k_fraction: float = 0.1
    threshold: Literal["k_fraction", "xmin_mid", "xmin_peak", "ks"] = "k_fraction"
    precise: bool = False
    raw: bool = True
    sites: tuple[str, ...] = ("*",)

    def validate(self) -> list[str]:
        """The choice of variant."""
        return check_options(self.spectra, self.threshold, self.k_fraction)

    def find(self, program: Program) -> list[Site]:
        """The selected sites; one that is used twice is looked at once."""
        return selected_sites(program, self.sites, "sites")

    def apply(self, program: Program, sites: list[Site], context: Context) -> Changes:
        """Annotate; all matrices that hold NaN are named in one error."""
        return measure_alpha(program, sites, self.options, context)

    def tables(self, program: Program) -> dict[str, str]:
        """`alpha.csv`, and `alpha_after.csv` where matrices were rounded."""
        found = {"alpha.csv": alpha_csv(program), "alpha_after.csv": alpha_after_csv(program, self.options)}
        return {name: text for name, text in found.items() if text}

    @property
    def options(self) -> AlphaOptions:
        """The estimator."""
        names = ("spectra", "k_fraction", "threshold", "precise", "raw")
        return AlphaOptions(**{name: getattr(self, name) for name in names})
