"""From scores to verdicts: what each arm costs at each budget, and whether it beats the reference beyond chance."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from aqtx.evaluate.perplexity import DocumentScores
from aqtx.evaluate.statistics import paired_change, perplexity_interval
from aqtx.numerics.intervals import Interval
from aqtx.program.plan import Plan
from aqtx.report.numbers import interval


@dataclass(frozen=True)
class Point:
    """One arm at one budget."""

    method: str
    bits: float
    seed: int
    bytes: int
    plan: Plan
    scores: DocumentScores


def study_json(before: DocumentScores, points: Sequence[Point], seed: int) -> dict[str, Any]:
    """Points, verdicts and the summary. The first point's arm is the reference."""
    reference = points[0].method
    rows = [_point_json(before, point, seed) for point in points]
    verdicts = [
        verdict
        for method in dict.fromkeys(point.method for point in points)
        if method != reference
        for verdict in _verdicts(method, reference, points, seed)
    ]
    return {
        "perplexity_before": perplexity_interval(before, seed=seed).to_json(),
        "reference": reference,
        "points": rows,
        "verdicts": verdicts,
        "summary": _summary(reference, verdicts),
    }


def _point_json(before: DocumentScores, point: Point, seed: int) -> dict[str, Any]:
    return {
        "method": point.method,
        "budget_bits": point.bits,
        "average_bits": point.plan.average_bits,
        "bytes": point.bytes,
        "seed": point.seed,
        "gap": point.plan.gap,
        "perplexity": perplexity_interval(point.scores, seed=seed).to_json(),
        "change": paired_change(before, point.scores, seed=seed).to_json(),
    }


def _verdicts(method: str, reference: str, points: Sequence[Point], seed: int) -> list[dict[str, Any]]:
    """One row per budget; the seeds of a random arm are averaged document by document."""
    rows = []
    for bits in dict.fromkeys(point.bits for point in points):
        own = [point for point in points if (point.method, point.bits) == (method, bits)]
        against = next(point for point in points if (point.method, point.bits) == (reference, bits))
        difference = paired_change(against.scores, _mean([point.scores for point in own]), seed=seed)
        row = {"method": method, "budget_bits": bits, "difference": difference.to_json(), "word": _word(difference)}
        if len(own) > 1:
            singles = [paired_change(against.scores, point.scores, seed=seed) for point in own]
            row["seeds_worse"] = sum((single.low or 0.0) > 0 for single in singles)
            row["seeds"] = len(own)
        rows.append(row)
    return rows


def _mean(scores: Sequence[DocumentScores]) -> DocumentScores:
    first = scores[0]
    nll = np.mean([score.nll for score in scores], axis=0)
    return DocumentScores(first.domains, nll, first.num_tokens, first.window, first.context)


def _word(difference: Interval) -> str:
    """What the interval says of an arm."""
    if not difference.excludes_zero:
        return "equal"
    return "worse" if difference.value > 0 else "better"


def _summary(reference: str, verdicts: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence per arm."""
    lines = []
    for method in dict.fromkeys(row["method"] for row in verdicts):
        rows = [row for row in verdicts if row["method"] == method]
        counts = {word: sum(row["word"] == word for row in rows) for word in ("better", "equal", "worse")}
        mean = sum(row["difference"]["value"] for row in rows) / len(rows)
        told = ", ".join(f"{word} at {count}" for word, count in counts.items() if count)
        lines.append(
            f"{method} against {reference}: {told} of {len(rows)} budgets, {mean:+.4f} nats per token on average"
        )
    return lines


def study_markdown(data: dict[str, Any]) -> str:
    """The study as text: a row per arm and budget, the verdicts, the correlations."""
    lines = ["| method | bits | model bytes | perplexity | change, nats per token |", "|---|---|---|---|---|"]
    for row in sorted(data["points"], key=lambda row: (row["budget_bits"], row["change"]["value"])):
        lines.append(
            f"| {row['method']} | {row['average_bits']:.3f} | {row['bytes']:,} | {interval(row['perplexity'])} "
            f"| {interval(row['change'], 4, signed=True)} |"
        )
    lines += ["", *(f"- {sentence}" for sentence in data["summary"]), ""]
    if data.get("quick"):
        lines += [data["quick"]["sentence"], ""]
    if data.get("calibrated"):
        lines += [data["calibrated"]["sentence"], ""]
    told = ", ".join(f"{name} {value:.1f}" for name, value in data.get("seconds", {}).items() if value >= 0.1)
    if told:
        lines += [f"Seconds to measure what the arms before had not: {told}.", ""]
    lines += _regrets(data.get("domains") or [])
    if data["trials"]:
        lines += [
            f"Rank correlation with the divergence measured on {data['trials']} matrices, one at a time:",
            "",
            "| sensitivity | all | within roles |",
            "|---|---|---|",
            *(f"| {row['method']} | {row['all']} | {row['within_roles']} |" for row in data["correlations"]),
        ]
    return "\n".join(lines) + "\n"


def _regrets(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What each objective costs each domain over the domain's own plan, measured."""
    if not rows:
        return []
    lines = [
        "Divergence by domain, thousandths of a nat, over that of the domain's own best plan at the same bytes:",
        "",
        "| bits | objective | domain | divergence | of its own plan | regret | predicted |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [f"{row['budget_bits']:g}", row["objective"], row["domain"]]
        cells += [f"{1000 * row[key]['value']:.3f}" for key in ("divergence", "own")]
        cells += [interval(row["regret"]), f"{row['predicted']:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]
