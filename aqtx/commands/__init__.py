"""The commands of `aqtx`, a file each: they parse and print; what they call does the work.

Their modules import nothing heavy at the top, since `aqtx --help` loads all of them.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Command:
    """One sub-command: its words in the help, its arguments, and the function that returns an exit status."""

    name: str
    summary: str
    example: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """RECIPE and its overrides, which several commands take."""
    parser.add_argument(
        "recipe", metavar="RECIPE", help="a recipe's YAML file, or the name of a shipped one (aqtx ls recipes)"
    )
    parser.add_argument(
        "overrides",
        metavar="key.path=value",
        nargs="*",
        help="replace a value of the recipe; passes are counted from 0, as in passes.1.assign_plan.average_bits=4.5",
    )


def seed(text: str) -> int:
    """An argument that a generator of random numbers takes."""
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"a seed is 0 or more and below 2^63, not {text}")
    return value
