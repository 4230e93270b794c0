"""Several runs on one page: an overview of what differs, then every section with the runs side by side."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from aqtx.errors import InputError, malformed
from aqtx.machine.command_output import made_folder
from aqtx.machine.files import write_text
from aqtx.report import html
from aqtx.report.canvas import PALETTE, panels, save_figure
from aqtx.report.data import RunData, read_run
from aqtx.report.numbers import decimal, duration, interval, is_number, megabytes
from aqtx.report.parts import PARTS, Part, build_part

PAGE = "compare.html"

_ROWS: tuple[tuple[str, Callable[[RunData], str]], ...] = (
    ("size before", lambda run: megabytes((run.report.get("bytes") or {}).get("before"))),
    ("size after", lambda run: megabytes((run.report.get("bytes") or {}).get("after"))),
    ("bits per planned weight", lambda run: decimal(run.report.get("average_bits"))),
    ("bits per weight, whole model", lambda run: decimal(run.report.get("average_bits_model"))),
    ("perplexity before", lambda run: interval(_perplexity(run).get("before"), 2)),
    ("perplexity after", lambda run: interval(_perplexity(run).get("after"), 2)),
    ("change, nats per token", lambda run: interval(_perplexity(run).get("change"), 4, signed=True)),
    ("plan", lambda run: str(run.plan.get("method", ""))),
    ("passes", lambda run: ", ".join(row["name"] for row in run.report.get("passes", []))),
    ("time", lambda run: duration(run.report.get("seconds"))),
    ("peak memory", lambda run: megabytes(run.report.get("peak_memory_bytes"))),
)


def _perplexity(run: RunData) -> dict[str, dict[str, float]]:
    return run.report.get("perplexity") or {}


def write_comparison(directories: Sequence[str | Path], output: str | Path) -> Path:
    """Build `compare.html` and its figures in the folder `output`; returns the page's path.

    Runs of one name are told apart by a number.
    """
    if len(directories) < 2:
        raise InputError("a comparison needs two runs or more")
    runs = dict[str, RunData]()
    for directory in directories:
        with malformed(f"{directory}: what it holds cannot be read"):
            run = read_run(Path(directory))
        names = (run.name, *(f"{run.name}-{count}" for count in range(2, len(directories) + 1)))
        runs[next(name for name in names if name not in runs)] = run
    with made_folder(Path(output), "compare", [PAGE, "figures/*.png"]) as folder:
        figures = folder / "figures"
        with malformed("no comparison can be made of these runs"):
            sections = [html.Section("overview", "Overview", _overview(runs, figures))]
            sections += [_side_by_side(part, runs, figures) for part in PARTS]
            page = html.page(" · ".join(runs), f"{len(runs)} runs side by side", sections)
        write_text(folder / PAGE, page)
    return Path(output) / PAGE


def _side_by_side(part: Part, runs: dict[str, RunData], figures: Path) -> html.Section:
    columns = {name: build_part(part, run, figures / str(index)) for index, (name, run) in enumerate(runs.items())}
    return html.Section(part.anchor, part.title, html.side_by_side(columns))


def _overview(runs: dict[str, RunData], figures: Path) -> str:
    table = html.table(("", *runs), [(label, *map(value, runs.values())) for label, value in _ROWS])
    settings = _different_settings(runs)
    differences = html.paragraph("Settings that differ:") + html.table(("setting", *runs), settings) if settings else ""
    points = {name: run for name, run in runs.items() if is_number((run.report.get("bytes") or {}).get("after"))}
    points = {name: run for name, run in points.items() if _perplexity(run).get("after")}
    if not points:
        return table + differences
    path = figures / "size_and_perplexity.png"
    save_figure(lambda: _draw(points), path)
    return table + differences + html.figure(path, "Perplexity against size, with 95 % intervals.")


def _draw(runs: dict[str, RunData]) -> Figure:
    figure, [axes] = panels(1, 1)
    for index, (name, run) in enumerate(runs.items()):
        after, size = _perplexity(run)["after"], run.report["bytes"]["after"] / 1e6
        ends = [
            [after["value"] - (after["low"] or after["value"])],
            [(after["high"] or after["value"]) - after["value"]],
        ]
        axes.errorbar(
            [size], [after["value"]], yerr=np.abs(ends), fmt="o", capsize=3, color=PALETTE[index % 9], label=name
        )
    axes.set(xlabel="model size, MB", ylabel="perplexity after")
    axes.legend()
    return figure


def _different_settings(runs: dict[str, RunData]) -> list[tuple[str, ...]]:
    """Dotted settings whose value is not the same in all runs."""
    flat = [_flatten(run.report.get("settings") or {}) for run in runs.values()]
    keys = dict.fromkeys(key for settings in flat for key in settings)
    rows = [(key, *(settings.get(key, "–") for settings in flat)) for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]


def _flatten(value: object, where: str = "") -> dict[str, str]:
    """Leaves by dotted place; a pass counts by its name, so that one more pass does not shift the others."""
    if isinstance(value, dict):
        parts = [_flatten(item, f"{where}.{key}" if where else str(key)) for key, item in value.items()]
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        parts = [_flatten(item if isinstance(item, dict) else {item: "on"}, where) for item in value]
    else:
        return {where: "–" if value is None else str(value)}
    return {key: text for part in parts for key, text in part.items()}
