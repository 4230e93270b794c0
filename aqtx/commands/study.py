"""`aqtx study`: which method of allocation is best on this model, and can its alpha be trusted?"""

import argparse

from aqtx.commands import Command, add_recipe


def run(arguments: argparse.Namespace) -> int:
    """Run the study, then print its table and verdicts."""
    from aqtx.runs.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    from aqtx.planning.arms import StudySpec
    from aqtx.report.write import write_report
    from aqtx.study.run import study_recipe

    _, directory = study_recipe(recipe, recipe.study or StudySpec())
    write_report(directory)
    print((directory / "study.md").read_text())
    print(directory)
    return 0


COMMAND = Command(
    name="study",
    summary="compare methods of allocation on held-out text at equal bytes, with intervals; writes <output>.study",
    example="aqtx study study study.average_bits=[3.5,4.5]",
    add_arguments=add_recipe,
    run=run,
)
