"""A run directory -> report.html and figures/*.png, from the data in the directory alone."""

from pathlib import Path

from aqtx.machine.files import write_text
from aqtx.machine.marker import add_names
from aqtx.report import html
from aqtx.report.data import RunData, read_run
from aqtx.report.parts import PARTS, build_part


def write_report(directory: str | Path) -> Path:
    """Build `report.html` and `figures/` in a run directory from the data it holds; returns the page's path.

    A piece of data that is missing leaves a sentence in its place. Figures of an earlier build are removed first, and
    nothing else.
    """
    data = read_run(Path(directory))
    figures = data.directory / "figures"
    names = [f"{stem}.png" for part in PARTS for stem in part.figures]
    for name in names:
        (figures / name).unlink(missing_ok=True)
    add_names(data.directory, ["report.html", *(f"figures/{name}" for name in names)])
    built = [html.Section(part.anchor, part.title, build_part(part, data, figures)) for part in PARTS]
    path = data.directory / "report.html"
    write_text(path, html.page(data.name, subtitle(data), built))
    return path


def subtitle(data: RunData) -> str:
    """The model and the passes, in one line."""
    settings = data.report.get("settings") or {}
    source = (settings.get("model") or {}).get("source")
    steps = [row["name"] for row in data.report.get("passes", [])]
    return " · ".join(word for word in (f"model {source}" if source else "", " → ".join(steps)) if word)
