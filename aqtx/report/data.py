"""A run directory as data: report.json, plan.json, alpha.csv and what passes left in `details`, merged by site.

Everything is optional. What is missing is `Absent`, a sentence that its section shows instead of a figure.
"""

import csv
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from aqtx.errors import InputError, printable
from aqtx.machine.files import read_json
from aqtx.program.roles import category_of, layer_of
from aqtx.report.numbers import is_number

_MOST_CELLS = 10_000_000  # of a map of layers and experts
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


class Absent(Exception):
    """A section's or figure's data is not in the run directory; the message says which."""


@dataclass
class RunData:
    """One run, read from its directory and nowhere else."""

    directory: Path
    report: dict[str, Any] = field(default_factory=dict)
    sites: dict[str, dict[str, Any]] = field(default_factory=dict)  # site name -> merged columns
    plan: dict[str, Any] = field(default_factory=dict)
    study: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)  # files that could not be read

    @property
    def name(self) -> str:
        """The run's name: its own, or the folder's."""
        return str(self.report.get("name") or self.directory.name)

    def need(self, key: str, what: str) -> Any:
        """An entry of report.json, or Absent."""
        value = self.report.get(key)
        if value in (None, {}, []):
            raise Absent(f"this run has no {what}.")
        return value

    def details(self, pass_name: str) -> dict[str, Any]:
        """What the last pass of that name left for the report, or an empty dict."""
        rows = [row for row in self.report.get("passes", []) if row.get("name") == pass_name]
        return dict(rows[-1].get("details") or {}) if rows else {}

    def having(self, *keys: str) -> list[dict[str, Any]]:
        """The sites that have a finite number under every key, in order."""
        return [site for site in self.sites.values() if all(is_number(site.get(key)) for key in keys)]

    def by_category(self, key: str) -> dict[str, np.ndarray]:
        """Finite values of a column by category; Absent if there are none."""
        groups: dict[str, list[float]] = {}
        for site in self.having(key):
            groups.setdefault(site["category"], []).append(float(site[key]))
        if not groups:
            raise Absent(f"no site of this run has a value for {key}.")
        return {name: np.array(values) for name, values in sorted(groups.items())}

    @cached_property
    def projections(self) -> list[str]:
        """Names of the experts' projections, in the order of the sites."""
        return list(dict.fromkeys(site["projection"] for site in self.sites.values() if site["expert"] is not None))

    def expert_grid(self, key: str, projection: str) -> np.ndarray:
        """[layers, experts] of a column for one projection; NaN where there is none."""
        return self._grid(key, [s for s in self.sites.values() if s["projection"] == projection], "expert")

    def attention_grid(self, key: str) -> np.ndarray:
        """[layers, 4] of a column for the q, k, v and o projections."""
        chosen = [site for site in self.sites.values() if site["projection"] in ATTENTION and site["expert"] is None]
        return self._grid(key, [{**site, "column": ATTENTION.index(site["projection"])} for site in chosen], "column")

    def _grid(self, key: str, sites: Iterable[Mapping[str, Any]], column: str) -> np.ndarray:
        cells = {(s["layer"], s[column]): s.get(key) for s in sites if s["layer"] is not None and s[column] is not None}
        if not any(is_number(value) for value in cells.values()):
            return np.empty((0, 0))
        shape = (max(row for row, _ in cells) + 1, max(col for _, col in cells) + 1)
        if math.prod(shape) > _MOST_CELLS:
            raise Absent(f"the names of sites ask for a map of {shape[0]} x {shape[1]} cells.")
        grid = np.full(shape, np.nan)
        for place, value in cells.items():
            if is_number(value):
                grid[place] = float(value)  # type: ignore[arg-type]
        return grid


def read_run(directory: Path) -> RunData:
    """Read whatever a run directory holds; a broken file becomes a note, not a crash."""
    if not directory.is_dir():
        raise InputError(f"{directory} is not a folder")
    data = RunData(directory)
    data.report = _read_json(data, "report.json")
    data.plan = _read_json(data, "plan.json")
    data.study = _read_json(data, "study.json")
    _merge(data, _plan_rows(data.plan))
    _merge(data, _csv_rows(data, "alpha.csv"))
    _merge(data, ({"site": row["site"], "alpha_after": row["alpha"]} for row in _csv_rows(data, "alpha_after.csv")))
    for row in data.report.get("passes") or []:
        _merge(data, (dict(site) for site in (row.get("details") or {}).get("sites", []) if isinstance(site, dict)))
    if not data.report and not data.sites and not data.study:
        raise InputError(f"{directory} holds none of report.json, plan.json, alpha.csv and study.json: not a run")
    return data


def _read_json(data: RunData, name: str) -> dict[str, Any]:
    path = data.directory / name
    if not path.is_file():
        return {}
    try:
        value = read_json(path)
    except InputError as error:
        data.problems.append(f"{name} cannot be read: {error}")
        return {}
    if not isinstance(value, dict):
        data.problems.append(f"{name} holds no object")
        return {}
    shown: dict[str, Any] = _shown(value)
    return shown


def _shown(value: Any) -> Any:
    """The same data with every name as a page and a figure can show it: half a surrogate pair cannot be drawn."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {printable(str(key)): _shown(item) for key, item in value.items()}
    return [_shown(item) for item in value] if isinstance(value, list) else value


def _csv_rows(data: RunData, name: str) -> Iterable[dict[str, Any]]:
    path = data.directory / name
    if not path.is_file():
        return
    with path.open(newline="") as stream:
        for row in csv.DictReader(stream):
            yield {
                "site": row.get("layer_name"),
                "alpha": _number(row.get("alpha_hill")),
                "numel": _number(row.get("numel")),
                "k_used": _number(row.get("k_used")),
                "method": row.get("method"),
            }


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None


def _plan_rows(plan: dict[str, Any]) -> Iterable[dict[str, Any]]:
    entries = plan.get("sites") or plan.get("entries") or {}
    items = entries.items() if isinstance(entries, dict) else ((entry.get("site"), entry) for entry in entries)
    for name, entry in items:
        yield {**entry, "site": name}


def _merge(data: RunData, rows: Iterable[dict[str, Any]]) -> None:
    for row in rows:
        name = row.pop("site", None)
        if not name:
            continue
        site = data.sites.setdefault(name, _named(name))
        site.update({key: value for key, value in row.items() if value is not None})
        if site.get("format") and is_number(site.get("bytes")) and is_number(site.get("numel")):
            site["bits"] = 8 * site["bytes"] / site["numel"]


def _named(name: str) -> dict[str, Any]:
    expert = re.search(r"\.experts\.(\d+)\.", name)
    return {
        "site": name,
        "category": category_of(name),
        "layer": layer_of(name),
        "expert": int(expert[1]) if expert else None,
        "projection": name.rpartition(".")[2],
    }
