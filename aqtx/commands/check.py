"""`aqtx check`: is this recipe right? Every problem at once, nothing is run."""

import argparse

from aqtx.commands import Command, add_recipe


def run(arguments: argparse.Namespace) -> int:
    """Load the recipe; an InputError carries what is wrong with it."""
    from aqtx.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    steps = " -> ".join(step.name for step in recipe.passes)
    print(f"{arguments.recipe}: all right. {recipe.model.source}: {steps or 'no passes'}")
    return 0


COMMAND = Command(
    name="check",
    summary="check a recipe and report all its problems at once; runs nothing",
    example="aqtx check quickstart passes.1.assign_plan.average_bits=4.5",
    add_arguments=add_recipe,
    run=run,
)
