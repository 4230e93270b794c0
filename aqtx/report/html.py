"""Pieces of a page: escaped text, tables, figures as data URIs, and the page around them. No script, no link out."""

import base64
import html
import importlib.resources
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from aqtx.errors import printable

_NUMBER = re.compile(r"[+\-]?\d|–$")  # the dash stands for a missing number


@dataclass(frozen=True)
class Section:
    """One heading of the page with its HTML."""

    anchor: str
    title: str
    body: str


def text(value: object) -> str:
    """Escaped for HTML."""
    return html.escape(printable(str(value)))


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table that scrolls on a narrow screen; columns that hold numbers only are right-aligned."""
    cells = [[text(cell) for cell in row] for row in rows]
    kinds = [
        ' class="number"' if cells and all(_NUMBER.match(row[index]) for row in cells) else ""
        for index in range(len(header))
    ]
    head = "".join(f"<th{kind}>{text(cell)}</th>" for kind, cell in zip(kinds, header, strict=True))
    lines = [
        "<tr>" + "".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(kinds, row, strict=True)) + "</tr>"
        for row in cells
    ]
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def figure(path: Path, caption: str) -> str:
    """A PNG inside the page."""
    data = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<figure id="figure-{text(path.stem)}"><img alt="{text(caption)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{text(caption)}</figcaption></figure>"
    )


def tiles(entries: Iterable[tuple[str, str, str]]) -> str:
    """Large values, each with a remark and a label under it: (label, value, remark)."""
    cells = (
        f'<div class="tile"><b>{text(value)}</b><i>{text(remark)}</i><span>{text(label)}</span></div>'
        for label, value, remark in entries
    )
    return f'<div class="tiles">{"".join(cells)}</div>'


def paragraph(words: str) -> str:
    """One paragraph of plain text."""
    return f"<p>{text(words)}</p>"


def absent(reason: str) -> str:
    """What stands in place of a figure or a table that has no data."""
    return f'<p class="absent">{text(reason)}</p>'


def fold(summary: str, body: str) -> str:
    """A part that is closed until it is asked for."""
    return f"<details><summary>{text(summary)}</summary>{body}</details>"


def side_by_side(columns: Mapping[str, str]) -> str:
    """Bodies under their names, next to each other where the screen is wide enough."""
    cells = "".join(f"<div><h3>{text(name)}</h3>{body}</div>" for name, body in columns.items())
    return f'<div class="columns">{cells}</div>'


def page(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """The whole document, self-contained."""
    style = importlib.resources.files("aqtx.report").joinpath("page.css").read_text()
    links = "".join(f'<a href="#{section.anchor}">{text(section.title)}</a>' for section in sections)
    bodies = "".join(
        f'<section id="{section.anchor}"><h2>{text(section.title)}</h2>{section.body}</section>' for section in sections
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # An empty icon: a browser would otherwise ask for /favicon.ico and note an error.
        f'<link rel="icon" href="data:,"><title>{text(title)}</title><style>{style}</style></head>'
        f'<body><header><h1>{text(title)}</h1><p class="soft">{text(subtitle)}</p><nav>{links}</nav></header>'
        f"<main>{bodies}</main></body></html>\n"
    )
