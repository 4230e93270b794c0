"""A study in words and tables: what each method costs at each budget, and which sensitivities rank matrices rightly."""

from typing import Any

from aqtx.report import html
from aqtx.report.data import Absent, RunData
from aqtx.report.numbers import count, decimal, interval, is_number


def study(data: RunData) -> str:
    """Verdicts, points and correlations."""
    found = data.study
    if not found.get("points"):
        raise Absent("this folder holds no study (study.json).")
    words = [
        (found.get("quick") or {}).get("sentence", ""),
        *found.get("summary", []),
        (found.get("calibrated") or {}).get("sentence", ""),
    ]
    sentences = "".join(f"<li>{html.text(sentence)}</li>" for sentence in words if sentence)
    return f"<ul>{sentences}</ul>" + _points(found["points"]) + _regrets(found) + _correlations(found)


def _points(points: list[dict[str, Any]]) -> str:
    header = ("method", "seed", "budget", "bits per weight", "model bytes", "perplexity", "change, nats per token")
    ordered = sorted(points, key=lambda row: (row.get("budget_bits") or 0, row["perplexity"]["value"]))
    rows = [
        (
            row["method"],
            count(row.get("seed")),
            decimal(row.get("budget_bits"), 2),
            decimal(row.get("average_bits")),
            count(row.get("bytes")),
            interval(row["perplexity"], 2),
            interval(row.get("change"), 4, signed=True),
        )
        for row in ordered
    ]
    return html.table(header, rows)


def _regrets(found: dict[str, Any]) -> str:
    rows = found.get("domains") or []
    if not rows:
        return ""
    words = (
        "Divergence by domain of the text, and its regret: the ratio to that of the domain's own plan at equal bytes."
    )
    header = ("budget", "objective", "domain", "divergence", "of its own plan", "regret", "predicted regret")
    cells = [
        (
            decimal(row.get("budget_bits"), 2),
            row["objective"],
            row["domain"],
            decimal((row.get("divergence") or {}).get("value"), 6),
            decimal((row.get("own") or {}).get("value"), 6),
            interval(row.get("regret")),
            decimal(row.get("predicted")),
        )
        for row in rows
    ]
    return html.paragraph(words) + html.table(header, cells)


def _correlations(found: dict[str, Any]) -> str:
    rows = found.get("correlations") or []
    if not rows:
        return ""
    words = f"Rank correlation with the loss measured on {found.get('trials', 0)} matrices, rounded one at a time."
    cells = [(row["method"], _value(row.get("all")), _value(row.get("within_roles"))) for row in rows]
    return html.paragraph(words) + html.table(("sensitivity", "all matrices", "within roles"), cells)


def _value(value: object) -> str:
    return decimal(value, 2) if is_number(value) or value is None else str(value)
