"""`annotate_alpha`: how heavy-tailed each weight matrix's spectrum is."""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from aqtx.errors import InputError
from aqtx.machine.ranks import current
from aqtx.numerics.alpha import AlphaStats, analyze, check_options
from aqtx.program.program import Program, Site
from aqtx.registry import Changes, Context, Pass, Refusal, register
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
        changes, broken = Changes(), []

        def measure(site: Site) -> tuple[AlphaStats, AlphaStats]:
            W = program.read(site).to(context.device)
            stats = self.analyze(W)
            return stats, self._analyze(W, "full") if self.raw and self.spectra != "full" else stats

        found = current().share(measure, sites, progress=partial(context.progress, description="annotate_alpha"))
        for site, (stats, raw) in zip(sites, found, strict=True):
            reason = stats.reason[0]
            if stats.method[0].endswith("/none") and reason is not None and "NaN" in reason:
                broken.append(f"{site.name}: {reason}")
                continue
            _annotate(site, stats, raw)
            if reason is None:
                changes.changed.append(site.name)
            else:
                changes.refused.append(Refusal(site.name, f"its alpha is degenerate: {reason}"))
        if broken:
            raise InputError(*broken)
        changes.details["sites"] = [{"site": site.name, "alpha_raw": site.get("alpha_info")["raw"]} for site in sites]
        return changes

    def analyze(self, W: Any) -> AlphaStats:
        """Alpha of one matrix by this pass's own estimator."""
        return self._analyze(W, self.spectra)

    def _analyze(self, W: Any, spectra: str) -> AlphaStats:
        return analyze(W, k_fraction=self.k_fraction, spectra=spectra, threshold=self.threshold, precise=self.precise)


def _annotate(site: Site, stats: AlphaStats, raw: AlphaStats) -> None:
    site.set("alpha", float(stats.alpha[0]) if stats.reason[0] is None else None)
    info = {"k_used": stats.k_used[0], "n_eigs": stats.num_eigenvalues[0], "method": stats.method[0]}
    raw_alpha = float(raw.alpha[0]) if raw.reason[0] is None else None
    site.set("alpha_info", {**info, "reason": stats.reason[0], "raw": raw_alpha})
