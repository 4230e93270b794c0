"""`aqtx plan`: decide the formats and touch no weight."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from aqtx.commands import Command, add_recipe
from aqtx.commands.tables import format_bytes, format_table

if TYPE_CHECKING:
    from aqtx.program.plan import Plan
    from aqtx.runs.recipe import Recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The recipe, and the two ways to plan without reading a weight."""
    add_recipe(parser)
    either = parser.add_mutually_exclusive_group()
    either.add_argument(
        "--config-only",
        action="store_true",
        help="read only the model's config.json: every matrix counts as Gaussian and equally sensitive",
    )
    either.add_argument(
        "--expand",
        metavar="plan.json",
        type=Path,
        help="print a plan written by hand in its other form: one scheme per site, or a default with overrides",
    )


def run(arguments: argparse.Namespace) -> int:
    """Plan and print the table, or convert a plan."""
    from aqtx.runs.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if arguments.expand is not None:
        print(json.dumps(converted(recipe, arguments.expand), indent=1))
        return 0
    from aqtx.runs.plan_only import plan_recipe, plan_table

    planned = plan_recipe(recipe, config_only=arguments.config_only)
    print(format_table(*plan_table(planned.plan)))
    print(f"\n{conclusion(planned.plan)}\n\n{planned.directory}")
    return 0


def conclusion(plan: "Plan") -> str:
    """Budget, what was reached, and how far from the optimum the plan can be."""
    asked = ", ".join(f"{key} {value:,g}" for key, value in plan.budget.items()) or "no budget"
    lines = [f"method {plan.method}, {asked}"]
    if plan.average_bits is not None:
        weights = sum(entry.numel for entry in plan.planned.values())
        size = format_bytes(sum(entry.bytes for entry in plan.planned.values()))
        lines.append(f"{plan.average_bits:.4f} bits per planned weight: {weights:,} weights in {size}")
    if plan.cost is not None and plan.gap is not None:
        optimum = (
            "proven to be the least" if plan.gap == 0 else f"at most {plan.gap:.2g} of it above the least possible"
        )
        lines.append(f"predicted loss {plan.cost:.6g}, {optimum}")
    return "\n".join(lines) + _domains(plan)


def _domains(plan: "Plan") -> str:
    """What the plan is foretold to cost each domain of the text."""
    if not plan.domains:
        return ""
    header = ["domain", "predicted loss", "of its own best plan", "regret"]
    rows = [
        [name, f"{row['loss']:.4g}", f"{row['own']:.4g}", f"{row['regret']:.3f}"] for name, row in plan.domains.items()
    ]
    lines = ["", "", format_table(header, rows)]
    if plan.worst_domain:
        lines.append(f"\nlargest regret at most {plan.worst_domain['gap']:.2g} of it above the least possible")
    return "\n".join(lines)


def converted(recipe: "Recipe", path: Path) -> dict[str, object]:
    """The plan's other form: layers of patterns become a scheme per site, anything else the layered form."""
    from aqtx.planning.manual import compact, expand, load_json, read_manual
    from aqtx.runs.opening import program_of

    data = load_json(str(path))
    names = [site.name for site in program_of(recipe, config_only=True).sites()]
    for warning in read_manual(data, names)[1]:
        print(f"aqtx: warning: {warning}", file=sys.stderr)
    layered = bool({"default", "overrides"} & set(data))
    return expand(data, names) if layered else compact(data, names)


COMMAND = Command(
    name="plan",
    summary="choose a format for every weight matrix and write plan.json and alpha.csv; changes no weight",
    example="aqtx plan quickstart passes.1.assign_plan.average_bits=4.5",
    add_arguments=add_arguments,
    run=run,
)
