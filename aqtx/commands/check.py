"""`aqtx check`: is this recipe right, and right for its model? Every problem at once, nothing is run."""

import argparse
import warnings

from aqtx.commands import Command, add_recipe


def run(arguments: argparse.Namespace) -> int:
    """Load the recipe, then hold it against its model; an InputError carries what is wrong."""
    from aqtx.errors import InputError
    from aqtx.runs.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    from aqtx.commands.summary import needs_table
    from aqtx.runs.memory_needs import needs
    from aqtx.runs.opening import program_of
    from aqtx.runs.preflight import preflight, unexportable, unread

    program = program_of(recipe)
    if problems := unread(recipe) + preflight(recipe, program):
        raise InputError(*problems)
    for sentence in unexportable(recipe, program):
        warnings.warn(sentence, stacklevel=2)
    steps = " -> ".join(step.name for step in recipe.passes)
    print(f"{arguments.recipe}: all right. {recipe.model.source}: {steps or 'no passes'}")
    print(needs_table(needs(recipe, program)))
    return 0


COMMAND = Command(
    name="check",
    summary="check a recipe, and whether it fits its model, and report all problems at once; runs nothing",
    example="aqtx check quickstart passes.1.assign_plan.average_bits=4.5",
    add_arguments=add_recipe,
    run=run,
)
