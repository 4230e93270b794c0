"""`aqtx compare`: several runs side by side on one page."""

import argparse
from pathlib import Path

from aqtx.commands import Command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The runs and the page."""
    parser.add_argument("directories", metavar="DIR", nargs="+", help="folders that `aqtx apply` wrote")
    parser.add_argument("--output", type=Path, default=Path("compare"), metavar="FOLDER", help="default: compare")


def run(arguments: argparse.Namespace) -> int:
    """Write the page and print where."""
    from aqtx.report.compare import write_comparison

    print(write_comparison(arguments.directories, arguments.output))
    return 0


COMMAND = Command(
    name="compare",
    summary="put several runs side by side on one page",
    example="aqtx compare out/quickstart out/int4 --output out/compare",
    add_arguments=add_arguments,
    run=run,
)
