"""Plans that a person wrote, in three forms of JSON, and their conversion into one another.

Layered: a default and overrides, merged key by key in file order; the last one wins, and a later `wq` lifts an
earlier `skip`. Patterns are globs over whole site names, `*` crosses dots.

    {"default": {"wq": "mxfp8", "aq": "mxfp8", "group_size": 128},
     "overrides": [{"pattern": "*.experts.*", "wq": "mxfp6", "comment": "..."}]}

Flat: a scheme per site, a format name or the keys above. Sites that are not named stay as they are.

    {"model.layers.0.mlp.experts.0.up_proj": {"wq": "int4", "group_size": 64}, "lm_head": "int8"}

Our own `plan.json`: `sites` with a `format` each; it must be of this very model.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aqtx.errors import InputError, nearest
from aqtx.machine.files import read_json
from aqtx.planning.schemes import SCHEME_KEYS, SchemeReader
from aqtx.program.plan import Plan
from aqtx.program.roles import hint_for, matcher

_REMARKS = ("summary", "search_summary", "comment")  # for people; nothing reads them
_UNQUANTIZED = {"skip": True}


@dataclass(frozen=True)
class Scheme:
    """What a manual plan says of one site: formats, or none and why."""

    format: str | None
    activation: str | None
    why: str


def load_json(source: str | dict[str, Any] | None) -> dict[str, Any]:
    """The content of a plan file, or the content itself."""
    if isinstance(source, dict):
        return source
    try:
        data = read_json(Path(str(source)))
    except InputError as error:
        raise InputError(*(f"plan {problem}" for problem in error.problems)) from None
    if not isinstance(data, dict):
        raise InputError(f"plan {source} holds no mapping at the top")
    return data


def read_manual(source: str | dict[str, Any] | None, names: Sequence[str]) -> tuple[dict[str, Scheme], list[str]]:
    """A scheme for every site, and warnings."""
    data = load_json(source)
    if isinstance(data.get("sites"), dict) and "method" in data:
        plan = Plan.from_json(data)
        plan.check_sites(names)
        return {name: Scheme(e.format, e.activation, e.why) for name, e in plan.sites.items()}, []
    reader = SchemeReader()
    schemes = {name: _scheme(reader, name, keys) for name, keys in flatten(data, names).items()}
    if reader.problems:
        raise InputError(*reader.problems)
    return schemes, reader.warnings()


def _scheme(reader: SchemeReader, name: str, keys: dict[str, Any]) -> Scheme:
    if keys.get("skip") or keys.get("wq") is None:
        return Scheme(None, None, str(keys.get("comment") or "skipped by the plan"))
    weights = reader.format_name(name, keys["wq"], keys)
    activation = reader.format_name(name, keys["aq"], keys) if keys.get("aq") is not None else None
    if weights is None:
        return Scheme(None, None, "the plan leaves its weights unquantized")
    return Scheme(weights, activation, str(keys.get("comment") or ""))


def flatten(data: dict[str, Any], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Either form -> the keys of every site: `wq`, `aq`, `group_size`, `extra`, `comment`, or `skip`."""
    return _flatten_layers(data, names) if {"default", "overrides"} & set(data) else _flatten_sites(data, names)


def _flatten_layers(data: dict[str, Any], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    problems = _unknown(data, ("default", "overrides", *_REMARKS), "plan")
    default, overrides = data.get("default") or {}, data.get("overrides") or []
    problems += _unknown(default, SCHEME_KEYS, "plan.default")
    if not isinstance(overrides, list):
        problems.append("plan.overrides: expected a list")
    wrong = (
        [i for i, override in enumerate(overrides) if not isinstance(override, dict)]
        if isinstance(overrides, list)
        else []
    )
    if wrong:
        problems.append(f"plan.overrides.{wrong[0]}: expected a mapping")
    if not isinstance(default, dict) or not isinstance(overrides, list) or wrong:
        raise InputError(*problems)
    merged: dict[str, dict[str, Any]] = {name: dict(default) for name in names}
    for i, override in enumerate(overrides):
        where = f"plan.overrides.{i}"
        problems += _unknown(override, ("pattern", *SCHEME_KEYS), where)
        pattern = str(override.get("pattern", ""))
        hits = [name for name in names if matcher(pattern).search(name)]
        if not hits:
            problems.append(f"{where}: pattern {pattern!r} matches no site{hint_for(pattern, names)}")
        keys = {key: value for key, value in override.items() if key != "pattern"}
        if "wq" in keys:
            keys.setdefault("skip", False)
        for name in hits:
            merged[name].update(keys)
    if problems:
        raise InputError(*problems)
    return merged


def _flatten_sites(data: dict[str, Any], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    schemes = {name: value for name, value in data.items() if name not in _REMARKS}
    known, problems = set(names), []
    unknown = [name for name in schemes if name not in known]
    if unknown:
        hint = nearest(unknown[0], names)
        problems.append(
            f"the plan is for another model: the first differing site is {unknown[0]!r}{hint} ({len(unknown)} in all)"
        )
    flat: dict[str, dict[str, Any]] = {name: dict(_UNQUANTIZED) for name in names}
    for name, value in schemes.items():
        keys = value if isinstance(value, dict) else {"wq": value}
        problems += _unknown(keys, SCHEME_KEYS, f"plan.{name}")
        flat[name] = dict(keys)
    if problems:
        raise InputError(*problems)
    return flat


def _unknown(keys: Any, known: Sequence[str], where: str) -> list[str]:
    if not isinstance(keys, dict):
        return [f"{where}: expected a mapping"]
    return [f"{where}: unknown key {key!r}{nearest(str(key), known)}" for key in keys if key not in known]


def expand(data: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Any form -> the flat form, one resolved scheme per site."""
    schemes, _ = read_manual(data, names)
    return {name: _told(scheme) for name, scheme in schemes.items()}


def _told(scheme: Scheme) -> dict[str, Any]:
    if scheme.format is None:
        return {"skip": True, **({"comment": scheme.why} if scheme.why else {})}
    told = {"wq": scheme.format, "aq": scheme.activation, "comment": scheme.why or None}
    return {key: value for key, value in told.items() if value is not None}


def compact(data: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Any form -> the layered form: the most frequent scheme as the default, the others site by site."""
    flat = {name: {k: v for k, v in keys.items() if k != "comment"} for name, keys in expand(data, names).items()}
    if not flat:
        return {"default": {}, "overrides": []}
    texts = {name: json.dumps(keys, sort_keys=True) for name, keys in flat.items()}
    common = Counter(texts.values()).most_common(1)[0][0]
    default = json.loads(common)
    cleared = dict.fromkeys((key for key in default if key == "aq"), None)
    overrides = [
        {"pattern": name.translate(_ESCAPES), **cleared, **flat[name]} for name in names if texts[name] != common
    ]
    return {"default": default, "overrides": overrides}


_ESCAPES = str.maketrans({"[": "[[]", "*": "[*]", "?": "[?]"})  # a site's name taken literally by a glob
