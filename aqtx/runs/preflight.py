"""What can be known to go wrong before a run begins: told at once, not after an hour of work."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from aqtx.errors import problems_of
from aqtx.evaluate.task_code import refuse_code
from aqtx.planning.settings import Settings
from aqtx.planning.target import missing
from aqtx.program.program import Program
from aqtx.registry import Pass
from aqtx.runs import memory_needs
from aqtx.runs.pipeline import misfits
from aqtx.runs.recipe import Recipe
from aqtx.text.calibration_spec import WRITTEN
from aqtx.text.sources import check_source

_FOLLOWED_BY: dict[str, str] = {"plan": "round", "round": "emit"}
_ADD = {
    "round": "nothing rounds what it plans: add `- gptq` or `- quantize` after it",
    "emit": "its codes are not emitted: add `- emit` as the last pass",
}


def preflight(recipe: Recipe, program: Program) -> list[str]:
    """A sentence for everything in a recipe that does not fit its model or is not there; reads no weight and no text.

    Args:
        recipe: validated by itself.
        program: its model.
    """
    problems = out_of_order(recipe.passes) + misfits(program, recipe.passes)
    for source in recipe.calibration.weights:
        if source not in WRITTEN:
            problems += _named("calibration.source", problems_of(partial(check_source, source)))
    problems += problems_of(recipe.calibration.parts)
    spec = recipe.evaluate
    if spec is not None and spec.perplexity is not None:
        text = spec.perplexity
        problems += _named("evaluate.perplexity", problems_of(lambda: check_source(text)))
    if spec is not None and spec.include_path is not None and not Path(spec.include_path).is_dir():
        problems.append(f"evaluate.include_path: there is no folder {spec.include_path!r}")
    elif spec is not None and spec.include_path is not None and not spec.allow_task_code:
        folder = Path(spec.include_path)
        problems += _named("evaluate.include_path", problems_of(lambda: refuse_code(folder)))
    return problems or memory_needs.problems(recipe, program)


def out_of_order(passes: Sequence[Pass]) -> list[str]:
    """What the order of passes leaves undone, with their places: a plan nobody carries out, codes nobody emits."""
    problems = []
    for place, step in enumerate(passes):
        before, after = passes[:place], passes[place + 1 :]
        found = step.misplaced(before, after)
        if step.stage in _FOLLOWED_BY and not any(later.stage == _FOLLOWED_BY[step.stage] for later in after):
            found.append(_ADD[_FOLLOWED_BY[step.stage]])
        problems += [f"passes.{place}.{step.name}: {problem}" for problem in found]
    return problems


def unread(recipe: Recipe) -> list[str]:
    """Keys that are given and that no method of the recipe reads: told by `aqtx check`, a warning when it runs."""
    return [
        f"passes.{place}.{step.name}.{sentence}"
        for place, step in enumerate(recipe.passes)
        if isinstance(step, Settings)
        for sentence in step.unread(recipe.study.keys(step) if recipe.study is not None else ())
    ]


def unexportable(recipe: Recipe, program: Program) -> list[str]:
    """What the targets of plans will have to be given when the model is exported: a warning, since it may come."""
    return [
        f"passes.{place}.{step.name}: target {step.target}: {sentence}"
        for place, step in enumerate(recipe.passes)
        if isinstance(step, Settings)
        for sentence in missing(step.target, program.config, program.folder)
    ]


def _named(key: str, problems: list[str]) -> list[str]:
    return [f"{key}: {problem}" for problem in problems]
