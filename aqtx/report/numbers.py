"""Numbers as people read them. A missing one is a dash."""

import math
from collections.abc import Mapping
from typing import Any

DASH = "–"


def is_number(value: object) -> bool:
    """A finite number, and not a truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def megabytes(count: object) -> str:
    """Bytes as kB, MB or GB, powers of ten."""
    if not is_number(count):
        return DASH
    value = float(count)  # type: ignore[arg-type]
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if abs(value) >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value / 1e3:.1f} kB"


def decimal(value: object, digits: int = 3) -> str:
    """A fixed number of decimals; very small ones in powers of ten."""
    if not is_number(value):
        return DASH
    number = float(value)  # type: ignore[arg-type]
    return f"{number:.{digits}f}" if number == 0 or abs(number) >= 10**-digits else f"{number:.1e}"


def count(value: object) -> str:
    """An integer with thousands marked."""
    return f"{int(value):,}" if is_number(value) else DASH  # type: ignore[call-overload]


def interval(value: Mapping[str, Any] | None, digits: int = 3, *, signed: bool = False) -> str:
    """`7.123 [7.010, 7.240]`; without ends only the value."""
    if not value or not is_number(value.get("value")):
        return DASH
    mark = "+" if signed else ""
    words = [
        f"{value[key]:{mark}.{digits}f}" if is_number(value.get(key)) else DASH for key in ("value", "low", "high")
    ]
    return words[0] if words[1] == DASH else f"{words[0]} [{words[1]}, {words[2]}]"


def duration(seconds: object) -> str:
    """Seconds, or minutes and seconds."""
    if not is_number(seconds):
        return DASH
    value = float(seconds)  # type: ignore[arg-type]
    return f"{value:.1f} s" if value < 120 else f"{int(value // 60)} min {int(value % 60)} s"
