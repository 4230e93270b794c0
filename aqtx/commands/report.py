"""`aqtx report`: build the page of a run again from the data in its folder."""

import argparse

from aqtx.commands import Command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run's folder."""
    parser.add_argument("directory", metavar="DIR", help="a folder that `aqtx apply` wrote")


def run(arguments: argparse.Namespace) -> int:
    """Write report.html and the figures, and print where."""
    from aqtx.report.write import write_report

    print(write_report(arguments.directory))
    return 0


COMMAND = Command(
    name="report",
    summary="rebuild report.html and its figures from a run's data",
    example="aqtx report out/quickstart",
    add_arguments=add_arguments,
    run=run,
)
