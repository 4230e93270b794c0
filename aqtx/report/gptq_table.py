"""What GPTQ did matrix by matrix: the totals, and the ones with the fewest tokens or the largest damping."""

from typing import Any

from aqtx.report import html
from aqtx.report.data import Absent, RunData
from aqtx.report.numbers import count, decimal, is_number

_SHOWN = 30


def gptq(data: RunData) -> str:
    """Totals, then the matrices that saw the fewest tokens."""
    sites = data.having("error_before", "error_after")
    if not sites:
        raise Absent("this run has no GPTQ pass.")
    before, after = (sum(site[key] for site in sites) for key in ("error_before", "error_after"))
    tokens = sorted(site["tokens"] for site in sites if is_number(site.get("tokens")))
    words = (
        f"Output error over {len(sites):,} matrices: {100 * (1 - after / before):.1f} % below round-to-nearest."
        if before
        else ""
    )
    if tokens:
        words += f" Tokens per matrix: {tokens[0]:,} to {tokens[-1]:,}, median {tokens[len(tokens) // 2]:,}."
    raised = [site for site in sites if is_number(site.get("damping_raised")) and site["damping_raised"] > 0]
    if raised:
        words += f" Damping had to be raised on {len(raised)} of them."
    fewest = sorted(sites, key=lambda site: (site.get("tokens") or 0, site["site"]))[:_SHOWN]
    header = ("matrix", "tokens", "damping", "shrinkage", "error, round-to-nearest", "error, GPTQ")
    rows = [
        (
            site["site"],
            count(site.get("tokens")),
            decimal(site.get("damping"), 4),
            decimal(site.get("shrinkage")),
            decimal(site["error_before"], 5),
            decimal(site["error_after"], 5),
        )
        for site in fewest
    ]
    fewest_table = html.fold(f"the {len(rows)} with the fewest tokens", html.table(header, rows))
    return html.paragraph(words) + fewest_table + _channels(data.details("gptq").get("channels") or [])


def _channels(channels: list[dict[str, Any]]) -> str:
    """Largest activation of each input channel: how far the outliers stand above the median channel."""
    if not channels:
        return ""
    ordered = sorted(channels, key=lambda row: -row["largest"] / max(row["median"], 1e-12))[:_SHOWN]
    rows = [
        (row["weight"], *(decimal(row[key], 2) for key in ("median", "p99", "largest")),
         decimal(row["largest"] / max(row["median"], 1e-12), 1))
        for row in ordered
    ]  # fmt: skip
    header = ("weight", "median channel", "99 % of channels", "largest channel", "largest / median")
    return html.fold("ranges of the input channels, widest first", html.table(header, rows))
