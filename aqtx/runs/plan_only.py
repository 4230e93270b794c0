"""`aqtx plan`: the passes that annotate and decide, without the passes that touch a weight."""

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from aqtx.errors import InputError
from aqtx.formats import Format, fake_quantize
from aqtx.machine.command_output import kept_folder
from aqtx.machine.files import write_text
from aqtx.machine.marker import claim
from aqtx.machine.output_folder import output_beside
from aqtx.planning.settings import Settings
from aqtx.program.plan import Plan, PlanEntry
from aqtx.program.program import Program
from aqtx.program.roles import CATEGORIES
from aqtx.registry import Pass
from aqtx.runs.apply import write_tables
from aqtx.runs.opening import program_of, recipe_context
from aqtx.runs.pipeline import Run
from aqtx.runs.preflight import unexportable
from aqtx.runs.recipe import Recipe

_GAUSSIAN_ROWS = 128
TABLES = ("alpha.csv", "alpha_after.csv")


@dataclass(frozen=True)
class Planned:
    """A plan, and the folder that holds plan.json and alpha.csv."""

    program: Program
    plan: Plan
    directory: Path


def plan_recipe(recipe: Recipe, *, config_only: bool = False, quiet: bool = False) -> Planned:
    """Run a recipe's planning passes and write plan.json and alpha.csv into `<output>.plan`.

    With `config_only` no weight is read: every matrix counts as Gaussian and equally sensitive, so
    that the plan's bytes and bits can be told for a model whose weights are elsewhere.
    """
    with kept_folder(output_beside(recipe.output, "plan"), ["plan.json", *TABLES]) as directory:
        return _plan(recipe, directory, config_only=config_only, quiet=quiet)


def _plan(recipe: Recipe, directory: Path, *, config_only: bool, quiet: bool) -> Planned:
    program = program_of(recipe, config_only=config_only)
    for sentence in unexportable(recipe, program):
        warnings.warn(sentence, stacklevel=2)
    passes: list[Pass] = [step for step in recipe.passes if step.stage in ("annotate", "plan")]
    if not any(step.stage == "plan" for step in passes):
        raise InputError("passes: there is no `assign_plan`, so there is nothing to plan")
    if config_only:
        deciding = [step for step in passes if step.stage == "plan"]
        passes = [step.on_assumed_costs() if isinstance(step, Settings) else step for step in deciding]
        assume_gaussian(program, [fmt for step in passes if isinstance(step, Settings) for fmt in step.formats])
    Run(program, recipe_context(recipe, program, quiet=quiet)).execute(passes)
    assert program.plan is not None
    claim(directory, "plan", ["plan.json"])
    write_text(directory / "plan.json", json.dumps(program.plan.to_json(), indent=1) + "\n")
    write_tables(program, recipe.passes, directory)
    return Planned(program, program.plan, directory)


def assume_gaussian(program: Program, formats: Sequence[Format]) -> None:
    """Annotate all sites as equally sensitive, with the errors that formats make on Gaussian data."""
    info = {"k_used": 0, "n_eigs": 0, "method": "assumed", "reason": None, "raw": None}
    errors: dict[int, dict[str, float]] = {}
    for site in program.sites():
        width = site.shape[1]
        if width not in errors:
            sample = torch.randn(_GAUSSIAN_ROWS, width, generator=torch.Generator().manual_seed(0))
            errors[width] = {fmt.name: _relative_error(sample, fmt) for fmt in formats}
        site.set("alpha", 1.0)
        site.set("alpha_info", info)
        site.set("error", dict(errors[width]))
        site.set("energy", float(site.numel))


def _relative_error(sample: torch.Tensor, fmt: Format) -> float:
    return float((sample - fake_quantize(sample, fmt)).square().sum() / sample.square().sum())


def plan_table(plan: Plan) -> tuple[list[str], list[list[str]]]:
    """Headers and one row per category: sites, mean alpha, formats, bytes, predicted loss."""
    rows = []
    for category in CATEGORIES:
        entries = [entry for entry in plan.sites.values() if entry.category == category]
        if entries:
            rows.append([category, *_category_row(entries)])
    return ["category", "sites", "mean alpha", "formats", "bytes", "predicted loss"], rows


def _category_row(entries: list[PlanEntry]) -> list[str]:
    alphas = [entry.alpha for entry in entries if entry.alpha is not None]
    counts: dict[str, int] = {}
    for entry in entries:
        counts[entry.format or "kept"] = counts.get(entry.format or "kept", 0) + 1
    costs = [entry.cost for entry in entries if entry.cost is not None]
    return [
        str(len(entries)),
        f"{sum(alphas) / len(alphas):.2f}" if alphas else "",
        ", ".join(f"{count} {name}" for name, count in sorted(counts.items())),
        f"{sum(entry.bytes for entry in entries):,}",
        f"{sum(costs):.4g}" if costs else "",
    ]
