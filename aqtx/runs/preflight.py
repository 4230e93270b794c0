"""What can be known to go wrong before a run begins: told at once, not after an hour of work."""

from pathlib import Path

from aqtx.errors import problems_of
from aqtx.program.program import Program
from aqtx.runs.pipeline import misfits
from aqtx.runs.recipe import Recipe
from aqtx.text.sources import check_source


def preflight(recipe: Recipe, program: Program) -> list[str]:
    """A sentence for everything in a recipe that does not fit its model or is not there; reads no weight and no text.

    Args:
        recipe: validated by itself.
        program: its model.
    """
    problems = misfits(program, recipe.passes)
    if recipe.calibration.source != "ebss":
        problems += _named("calibration.source", problems_of(lambda: check_source(recipe.calibration.source)))
    spec = recipe.evaluate
    if spec is not None and spec.perplexity is not None:
        text = spec.perplexity
        problems += _named("evaluate.perplexity", problems_of(lambda: check_source(text)))
    if spec is not None and spec.include_path is not None and not Path(spec.include_path).is_dir():
        problems.append(f"evaluate.include_path: there is no folder {spec.include_path!r}")
    return problems


def _named(key: str, problems: list[str]) -> list[str]:
    return [f"{key}: {problem}" for problem in problems]
