"""The final words of a run: `report.json` as a table for the terminal."""

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from aqtx.commands.tables import format_bytes, format_seconds, format_table
from aqtx.report.numbers import interval

if TYPE_CHECKING:
    from aqtx.runs.memory_needs import Need


def summarize(data: dict[str, Any]) -> str:
    """Size and perplexity before and after, then what each pass did and left alone."""
    blocks = [
        format_table(["", "before", "after", "change"], list(_outcome_rows(data))),
        format_table(
            ["pass", "time", "changed", "refused", "max difference"], [_pass_row(row) for row in data["passes"]]
        ),
        *_refusals(data["passes"]),
        _totals(data),
    ]
    return "\n\n".join(blocks)


def _outcome_rows(data: dict[str, Any]) -> Iterator[list[str]]:
    before, after = data["bytes"]["before"], data["bytes"]["after"]
    total = data["weights"]["total"]
    yield ["size", format_bytes(before), format_bytes(after), f"{after / before:.1%} of before"]
    yield ["bits per weight", f"{before * 8 / total:.2f}", f"{data['average_bits_model']:.2f}", ""]
    if data["average_bits"] is not None:
        yield ["  of the planned weights", "", f"{data['average_bits']:.2f}", ""]
    if data.get("perplexity"):
        yield _perplexity_row("perplexity", data["perplexity"])
        for domain, entry in data.get("perplexity_by_domain", {}).items():
            yield _perplexity_row(f"  {domain}", entry)


def _perplexity_row(name: str, entry: dict[str, Any]) -> list[str]:
    change = f"{interval(entry['change'], 4, signed=True)} nats per token"
    return [name, interval(entry["before"]), interval(entry["after"]), change]


def _pass_row(row: dict[str, Any]) -> list[str]:
    difference = row["max_difference"]
    exact = "" if difference is None else f"{difference:.1e} (tolerance {row['tolerance']:.1e})"
    return [row["name"], format_seconds(row["seconds"]), str(row["changed"]), str(len(row["refused"])), exact]


def _refusals(passes: list[dict[str, Any]]) -> list[str]:
    """One line per pass and kind of reason, with how many sites it holds for and the first of them."""
    lines = []
    for row in passes:
        alike: dict[str, list[dict[str, str]]] = {}
        for refusal in row["refused"]:
            alike.setdefault(re.sub(r" \(\w+\)", "", refusal["why"]), []).append(refusal)  # but for a node's name
        for refusals in alike.values():
            more = f" and {len(refusals) - 1} more" if len(refusals) > 1 else ""
            lines.append(f"{row['name']} left {refusals[0]['site']}{more} alone: {refusals[0]['why']}")
    return ["\n".join(lines)] if lines else []


def _totals(data: dict[str, Any]) -> str:
    parts = []
    for fate in ("quantized", "kept", "refused"):
        count, sites = data["weights"][fate], data["sites"][fate]
        parts.append(f"{count:,} {fate} ({sites} matrices)")
    memory = format_bytes(data["peak_memory_bytes"])
    source = f"source: {data['source']}\n" if data.get("source") else ""
    return (
        f"{source}{data['weights']['total']:,} weights = {' + '.join(parts)}\n"
        f"{format_seconds(data['seconds'])}, at most {memory} of memory"
    )


def needs_table(needs: "Sequence[Need]") -> str:
    """What each stage will take at most, before it begins."""
    rows = [
        [need.stage, format_bytes(need.peak), format_bytes(need.disk) if need.disk else "", need.streams]
        for need in needs
    ]
    return format_table(["stage", "memory, at most about", "disk", "streams"], rows)


def print_needs(needs: "Sequence[Need]") -> None:
    """The table, and a line between it and what the run prints at its end."""
    print(needs_table(needs) + "\n")
