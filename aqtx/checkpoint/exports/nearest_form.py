"""The format nearest to one that a target cannot hold."""

from collections.abc import Callable

from aqtx.errors import InputError
from aqtx.formats.table import Format, names, parse


def nearest_form(fmt: Format, num_columns: int, has_form: Callable[[Format], bool]) -> str | None:
    """The format nearest in stored bits among the table's rows; first the same code in other groups."""
    shape = (256, num_columns)
    own = fmt.name.partition("@")[0].removesuffix("_asym").removesuffix("_row").partition("_g")[0]
    others = [made for name in names() for made in (_parse(name),) if made and made.is_packed and has_form(made)]
    regrouped = [_parse(f"{own}_{group}") for group in ("g64", "g32", "row")]
    same = [made for made in [_parse(own), *regrouped] if made and has_form(made)]
    if same:
        return same[0].name
    if not others:  # rows that no default group divides
        others = [
            made
            for name in names()
            for group in ("g64", "g32", "row")
            if (made := _parse(f"{name}_{group}")) and has_form(made)
        ]
    return min(others, key=lambda made: abs(made.bits(shape) - fmt.bits(shape))).name if others else None


def _parse(name: str) -> Format | None:
    """The format, or None where the name's parts do not go together."""
    try:
        return parse(name)
    except InputError:
        return None
