"""`aqtx apply`: run a recipe from checkpoint to report."""

import argparse

from aqtx.commands import Command, add_recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The recipe, and what to do about an output folder that is already there."""
    add_recipe(parser)
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--resume", action="store_true", help="go on where an unfinished run stopped")
    either.add_argument("--overwrite", action="store_true", help="replace the run that is in the output folder")


def run(arguments: argparse.Namespace) -> int:
    """Apply, then print what came of it."""
    from aqtx.commands.summary import print_needs, summarize
    from aqtx.runs.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    from aqtx.machine.ranks import joined
    from aqtx.runs.apply import (
        apply_recipe,  # after the recipe: its mistakes are told before anything large is imported
    )

    with joined() as ranks:
        report = apply_recipe(
            recipe, resume=arguments.resume, overwrite=arguments.overwrite, ranks=ranks, tell=print_needs
        )
    if ranks.leads:
        print(summarize(report.data))
        print(f"\n{report.directory / 'report.html' if recipe.report else report.directory}")
    return 0


COMMAND = Command(
    name="apply",
    summary="run a recipe: read the model, run the passes, evaluate, write the quantized checkpoint and the report",
    example="aqtx apply quickstart output=out/smaller passes.1.assign_plan.average_bits=4.5",
    add_arguments=add_arguments,
    run=run,
)
