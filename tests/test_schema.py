"""Typed fields from plain values: what is accepted, and the sentence for what is not."""

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from aqtx.errors import InputError
from aqtx.schema import parse_fields, plain


@dataclass(frozen=True, kw_only=True)
class Inner:
    low: int = 0
    high: float = 1.0

    def __post_init__(self):
        if self.low > self.high:
            raise InputError(f"low ({self.low}) is above high ({self.high})")


@dataclass(frozen=True, kw_only=True)
class Sample:
    name: str
    count: int = 1
    share: float = 0.5
    flag: bool = False
    mode: Literal["fast", "exact"] = "fast"
    limit: int | None = None
    size: int | Literal["row"] = 32
    names: tuple[str, ...] = ()
    pair: tuple[int, float] = (1, 2.0)
    sizes: list[int] = field(default_factory=list)
    weights: dict[str, float] = field(default_factory=dict)
    inner: Inner = field(default_factory=Inner)
    maybe: Inner | None = None
    free: Any = None


def test_values_of_every_kind_are_taken_as_they_are():
    values = {
        "name": "x",
        "count": 3,
        "share": 1,  # an integer where a number is wanted
        "flag": True,
        "mode": "exact",
        "limit": None,
        "size": "row",
        "names": ["a", "b"],  # a YAML list becomes the tuple that the field declares
        "pair": [4, 5],
        "sizes": [1, 2],
        "weights": {"a": 1},
        "inner": {"low": -1},
        "maybe": {"high": 2},
        "free": {"anything": [1]},
    }
    made, problems = parse_fields(Sample, values, "here")
    assert problems == []
    assert made == Sample(
        name="x",
        count=3,
        share=1.0,
        flag=True,
        mode="exact",
        size="row",
        names=("a", "b"),
        pair=(4, 5.0),
        sizes=[1, 2],
        weights={"a": 1.0},
        inner=Inner(low=-1),
        maybe=Inner(high=2.0),
        free={"anything": [1]},
    )
    assert type(made.share) is float


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"nam": "x", "name": "x"}, "p.nam: unknown key, did you mean 'name'?"),
        ({}, "p.name: this key is required"),
        ({"name": 3}, "p.name: expected text, got 3"),
        ({"name": "x", "count": True}, "p.count: expected an integer, got true"),
        ({"name": "x", "count": "3"}, "p.count: expected an integer, got '3'"),
        ({"name": "x", "count": 2.5}, "p.count: expected an integer, got 2.5"),
        ({"name": "x", "share": float("nan")}, "p.share: expected a finite number, got nan"),
        ({"name": "x", "share": "1e-4"}, "p.share: expected a number, got '1e-4'"),
        ({"name": "x", "flag": 1}, "p.flag: expected true or false, got 1"),
        ({"name": "x", "mode": "exat"}, "p.mode: expected one of fast, exact, got 'exat', did you mean 'exact'?"),
        ({"name": "x", "limit": "all"}, "p.limit: expected an integer or null, got 'all'"),
        ({"name": "x", "size": "rwo"}, "p.size: expected an integer or row, got 'rwo', did you mean 'row'?"),
        ({"name": "x", "names": "a"}, "p.names: expected a list of text, got 'a'"),
        ({"name": "x", "names": ["a", 1]}, "p.names.1: expected text, got 1"),
        ({"name": "x", "pair": [1]}, "p.pair: expected 2 values, got 1"),
        ({"name": "x", "weights": {"a": "b"}}, "p.weights.a: expected a number, got 'b'"),
        ({"name": "x", "weights": 3}, "p.weights: expected a mapping to a number, got 3"),
        ({"name": "x", "inner": 3}, "p.inner: expected a mapping with the keys low, high, got 3"),
        ({"name": "x", "inner": {"lo": 3}}, "p.inner.lo: unknown key, did you mean 'low'?"),
        ({"name": "x", "inner": {"low": 3}}, "p.inner: low (3) is above high (1.0)"),
        ({"name": "x", "maybe": {"low": "z"}}, "p.maybe.low: expected an integer, got 'z'"),
        ({"name": "x", "inner": {"zzz": 3}}, "p.inner.zzz: unknown key; the keys here are low, high"),
    ],
)
def test_each_mistake_has_its_sentence(values, problem):
    assert parse_fields(Sample, values, "p") == (None, [problem])


def test_all_mistakes_are_told_at_once():
    _, problems = parse_fields(Sample, {"cont": 1, "share": "x", "inner": {"lo": 1, "high": "y"}}, "")
    assert problems == [
        "cont: unknown key, did you mean 'count'?",
        "name: this key is required",
        "share: expected a number, got 'x'",
        "inner.lo: unknown key, did you mean 'low'?",
        "inner.high: expected a number, got 'y'",
    ]


def test_plain_turns_dataclasses_and_tuples_into_lists_and_dicts():
    assert plain(Sample(name="x", names=("a",)))["names"] == ["a"]
    assert plain({"a": (Inner(),)}) == {"a": [{"low": 0, "high": 1.0}]}
