"""`aqtx study`: which method of allocation is best on this model, and can its alpha be trusted?"""

import argparse

from aqtx.commands import Command, add_recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The recipe, and whether the quick verdict is enough."""
    add_recipe(parser)
    parser.add_argument(
        "--quick", action="store_true", help="only tell whether alpha can be trusted, in less than a minute or so"
    )


def run(arguments: argparse.Namespace) -> int:
    """Tell quickly whether alpha can be trusted; then, unless that is enough, run the study and print its verdicts."""
    from aqtx.runs.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    from aqtx.planning.arms import StudySpec
    from aqtx.report.write import write_report
    from aqtx.study.run import quick_recipe, study_recipe

    if arguments.quick:
        print(quick_recipe(recipe).sentence)
        print(f"\nEvery method at equal bytes, on held-out text: aqtx study {arguments.recipe}")
        return 0
    _, directory = study_recipe(recipe, recipe.study or StudySpec(), tell=lambda quick: print(quick.sentence, "\n"))
    write_report(directory)
    print((directory / "study.md").read_text())
    print(directory)
    return 0


COMMAND = Command(
    name="study",
    summary="tell whether alpha can be trusted, then compare methods on held-out text at equal bytes; writes "
    "<output>.study",
    example="aqtx study study study.average_bits=[3.5,4.5]",
    add_arguments=add_arguments,
    run=run,
)
