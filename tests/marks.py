"""Parameters of tests that the default suite leaves to `-m slow`, since others stand for them."""

from typing import Any

import pytest


def slow(*values: Any) -> list[Any]:
    """Each value, a tuple of several or one alone, as a parameter that is slow."""
    return [
        pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow) for value in values
    ]


def slow_but(quick: Any, values: Any) -> list[Any]:
    """All `values` in order; those that are not among `quick` are slow."""
    return [value if value in quick else slow(value)[0] for value in values]
