"""The tables of a run's page: summary, perplexity, plan, passes, settings. Each takes the data and returns HTML."""

from collections import Counter
from typing import Any

import yaml

from aqtx.report import html
from aqtx.report.data import Absent, RunData
from aqtx.report.numbers import count, decimal, duration, interval, is_number, megabytes

_SHOWN_REFUSALS = 40
_WELL_USED = 0.99  # of a budget


def summary(data: RunData) -> str:
    """The tiles, and how many weights became what."""
    report = data.report
    if not report:
        raise Absent("report.json is not in this folder.")
    size = report.get("bytes") or {}
    perplexity = report.get("perplexity") or {}
    before, after = size.get("before") or 0, size.get("after") or 0
    change = perplexity.get("change")
    entries = [
        ("size before", megabytes(size.get("before")), ""),
        ("size after", megabytes(size.get("after")), f"{100 * after / before:.1f} % of before" if before else ""),
        ("bits per planned weight", decimal(report.get("average_bits")), ""),
        ("bits per weight, whole model", decimal(report.get("average_bits_model")), ""),
        ("perplexity before", *_parts(perplexity.get("before"), 2)),
        ("perplexity after", *_parts(perplexity.get("after"), 2)),
        ("change, nats per token", *_parts(change, 4, signed=True)),
        ("time", duration(report.get("seconds")), ""),
        ("peak memory", megabytes(report.get("peak_memory_bytes")), ""),
    ]
    return html.tiles(entries) + _source(report) + _verdict(change) + _coverage(report)


def _source(report: dict[str, Any]) -> str:
    """How the source's weights were packed, where they were."""
    found = report.get("source")
    return html.paragraph(f"Source: {found}; sizes are of the weights as they were decoded.") if found else ""


def _parts(value: dict[str, Any] | None, digits: int, *, signed: bool = False) -> tuple[str, str]:
    """An interval's value, and its ends."""
    words, _, ends = interval(value, digits, signed=signed).partition(" ")
    return words, ends


def _verdict(change: dict[str, Any] | None) -> str:
    if not change or not is_number(change.get("low")):
        return ""
    if change["low"] > 0:
        words = "The loss from quantization is larger than chance explains: its 95 % interval lies above zero."
    elif change["high"] < 0:
        words = "The quantized model is better on this text beyond the 95 % interval."
    else:
        words = "The change lies within the 95 % interval: this text does not tell the two models apart."
    return html.paragraph(words)


def _coverage(report: dict[str, Any]) -> str:
    keys = ("total", "quantized", "kept", "refused")
    rows = [
        (label, *(count((report.get(name) or {}).get(key)) for key in keys))
        for label, name in (("weights", "weights"), ("matrices", "sites"))
    ]
    return html.table(("", *keys), rows)


def perplexity(data: RunData) -> str:
    """Before, after and the paired change, in all and by domain."""
    entries = {"all": data.need("perplexity", "perplexity"), **(data.report.get("perplexity_by_domain") or {})}
    rows = [
        (
            name,
            count(entry.get("num_documents")),
            count(entry.get("num_tokens")),
            interval(entry.get("before"), 2),
            interval(entry.get("after"), 2),
            interval(entry.get("change"), 4, signed=True),
        )
        for name, entry in entries.items()
    ]
    header = ("text", "documents", "tokens", "before", "after", "change, nats per token")
    window, context = entries["all"].get("window"), entries["all"].get("context")
    note = (
        "Every token of a document but its first is scored once"
        + (f", in windows of {window} tokens (overlap {context}). " if is_number(window) else ". ")
        + "Intervals are 95 %, from 10,000 resamples of the documents; the change is paired."
    )
    return html.table(header, rows) + html.paragraph(note)


def tasks(data: RunData) -> str:
    """Accuracy of each task, with its interval, and the paired difference where there is one."""
    results = data.need("tasks", "task results")
    rows = [
        (
            name,
            entry.get("metric", ""),
            count(entry.get("num_items")),
            interval(entry.get("before")),
            interval(entry.get("after")),
            interval(entry.get("change"), signed=True),
        )
        for name, entry in results.items()
    ]
    return html.table(("task", "metric", "items", "before", "after", "change (paired)"), rows)


def plan(data: RunData) -> str:
    """Per category: matrices, mean alpha, formats, bytes, bits."""
    if not data.plan:
        raise Absent("plan.json is not in this folder.")
    facts = {
        key: data.plan[key] for key in ("method", "average_bits", "gap", "bound") if data.plan.get(key) is not None
    }
    words = ", ".join(f"{key} {decimal(v, 4) if is_number(v) else v}" for key, v in facts.items())
    groups: dict[str, list[dict[str, Any]]] = {}
    for site in data.sites.values():
        groups.setdefault(site["category"], []).append(site)
    header = ("category", "matrices", "formats", "mean alpha", "bytes", "bits per weight", "mean relative error")
    rows = [_plan_row(name, sites) for name, sites in sorted(groups.items())]
    table = html.table(header, rows) + _foretold(data) + _domains(data.plan)
    return (html.paragraph(words.capitalize() + ".") if words else "") + _price(data) + table


def _foretold(data: RunData) -> str:
    """The loss that the plan foretells against the one that was measured, if any."""
    if not is_number(data.plan.get("foretold")):
        return ""
    words = f"Foretold loss: {decimal(data.plan['foretold'], 4)} nats per token, each matrix alone to nearest, "
    change = (data.report.get("perplexity") or {}).get("change")
    measured = interval(change, 4, signed=True) if change else "not measured"
    return html.paragraph(f"{words}added up. Change of the whole: {measured}.")


def _domains(found: dict[str, Any]) -> str:
    """What the plan is foretold to cost each domain of the text, and its own best plan would at the same bytes."""
    if not found.get("domains"):
        return ""
    words = "Predicted loss by domain of the calibration text, in nats per token. The regret is over the plan that is "
    words += (
        "best for the domain alone, at the same bytes; held against the text that chose it, that plan looks too good."
    )
    if gap := (found.get("worst_domain") or {}).get("gap"):
        words += f" The largest regret is at most {decimal(gap, 4)} of it above the least possible."
    rows = [
        (name, decimal(row.get("loss"), 6), decimal(row.get("own"), 6), decimal(row.get("regret")))
        for name, row in found["domains"].items()
    ]
    return html.paragraph(words) + html.table(("domain", "predicted loss", "of its own best plan", "regret"), rows)


def _price(data: RunData) -> str:
    """What the program that the plan is for costs it, by the costs that it was made from."""
    target = data.details("assign_plan").get("target")
    if not target:
        return ""
    bits, free = (decimal(target.get(key), 4) for key in ("bits", "free_bits"))
    cost, without = (f"{target[key]:.4g}" for key in ("cost", "free_cost"))
    words = (
        f"For {target.get('name')}: {bits} bits per weight in what it loads, predicted cost {cost}. Were matrices free "
        f"to differ that it makes share a format, the same costs would give {without} at {free} bits."
    )
    given = target.get("budget")
    if is_number(given) and target["bits"] < _WELL_USED * given:
        words += f" The budget is {decimal(given, 4)} bits: no plan of these candidates within it has a lower cost."
    return html.paragraph(words)


def _plan_row(name: str, sites: list[dict[str, Any]]) -> tuple[str, ...]:
    formats = Counter(site.get("format") or "kept" for site in sites)
    words = ", ".join(f"{word} × {number}" for word, number in sorted(formats.items()))
    size = [site["bytes"] for site in sites if is_number(site.get("bytes"))]
    sized = [site for site in sites if is_number(site.get("bytes")) and is_number(site.get("numel"))]
    weights = sum(site["numel"] for site in sized)
    bits = 8 * sum(site["bytes"] for site in sized) / weights if weights else None
    mean = {key: _mean(sites, key) for key in ("alpha", "error")}
    return (name, count(len(sites)), words, decimal(mean["alpha"], 2), megabytes(sum(size) if size else None),
            decimal(bits, 2), decimal(mean["error"], 5))  # fmt: skip


def _mean(sites: list[dict[str, Any]], key: str) -> float | None:
    values = [site[key] for site in sites if is_number(site.get(key))]
    return sum(values) / len(values) if values else None


def passes(data: RunData) -> str:
    """What each pass did, how long it took, what it refused and why."""
    rows = data.need("passes", "passes")
    cells = [
        (
            row["name"],
            duration(row.get("seconds")),
            count(row.get("changed")),
            count(len(row.get("refused", []))),
            decimal(row.get("max_difference"), 8),
        )
        for row in rows
    ]
    header = ("pass", "time", "changed", "refused", "largest difference (exact passes)")
    return html.table(header, cells) + "".join(_refusals(row) for row in rows if row.get("refused"))


def _refusals(row: dict[str, Any]) -> str:
    reasons: dict[str, list[str]] = {}
    for refusal in row["refused"]:
        reasons.setdefault(refusal["why"], []).append(refusal["site"])
    lines = [(why, count(len(sites)), _some(sites)) for why, sites in reasons.items()][:_SHOWN_REFUSALS]
    title = f"{row['name']} left {len(row['refused']):,} matrices alone: {len(reasons)} reasons"
    return html.fold(title, html.table(("why", "matrices", "which"), lines))


def _some(sites: list[str]) -> str:
    return ", ".join(sites[:3]) + (f" and {len(sites) - 3:,} more" if len(sites) > 3 else "")


def settings(data: RunData) -> str:
    """The resolved recipe, versions, and files that could not be read."""
    parts = [html.paragraph(problem) for problem in data.problems]
    if data.report.get("settings"):
        recipe = yaml.safe_dump(data.report["settings"], sort_keys=False)
        parts.append(html.fold("the resolved recipe", f"<pre>{html.text(recipe)}</pre>"))
    if data.report.get("versions"):
        parts.append(html.table(("", "version"), data.report["versions"].items()))
    if not parts:
        raise Absent("report.json holds neither settings nor versions.")
    return "".join(parts)
