"""A run directory -> report.html and figures/*.png, from the data in the directory alone."""

import tempfile
from pathlib import Path

from aqtx.errors import malformed
from aqtx.machine.files import write_bytes, write_text
from aqtx.machine.lock import OutputLock
from aqtx.machine.marker import claim, refuse_claim
from aqtx.report import html
from aqtx.report.data import RunData, read_run
from aqtx.report.parts import PARTS, build_part

PAGE = "report.html"


def write_report(directory: str | Path) -> Path:
    """Build `report.html` and `figures/` in a run directory from the data it holds; returns the page's path.

    A piece of data that is missing leaves a sentence in its place. Figures of an earlier build are removed when the new
    ones are there, and nothing else.

    Raises:
        InputError: the data is nothing that a run writes, or files of the page's names are there that aqtx did not
            write; nothing has changed then.
    """
    folder, lock = Path(directory), OutputLock(Path(directory).resolve())
    try:
        return _write(folder)
    finally:
        lock.release()


def _write(folder: Path) -> Path:
    names = [f"figures/{stem}.png" for part in PARTS for stem in part.figures]
    refuse_claim(folder, [PAGE, *names])
    with tempfile.TemporaryDirectory() as made:
        with malformed(f"{folder}: no report can be made of what it holds"):
            data = read_run(folder)
            built = [html.Section(part.anchor, part.title, build_part(part, data, Path(made))) for part in PARTS]
            page = html.page(data.name, subtitle(data), built)
        claim(folder, "report", [PAGE, *names])
        for name in names:
            drawn, place = Path(made, Path(name).name), folder / name
            if drawn.exists():
                write_bytes(place, drawn.read_bytes())
            else:
                place.unlink(missing_ok=True)
    write_text(folder / PAGE, page)
    return folder / PAGE


def subtitle(data: RunData) -> str:
    """The model and the passes, in one line."""
    settings = data.report.get("settings") or {}
    source = (settings.get("model") or {}).get("source")
    steps = [str(row["name"]) for row in data.report.get("passes") or []]
    return " · ".join(word for word in (f"model {source}" if source else "", " → ".join(steps)) if word)
