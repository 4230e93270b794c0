"""`aqtx eval`: perplexity and tasks of one or several models, side by side."""

import argparse
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from aqtx.commands import Command, seed
from aqtx.commands.tables import format_table
from aqtx.report.numbers import interval

if TYPE_CHECKING:
    from aqtx.evaluate.arms import EvalResults


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The models and what to measure on them."""
    parser.add_argument(
        "models",
        metavar="MODEL",
        nargs="+",
        help="a folder, shipped name or hub name, NAME=MODEL to name it; others are compared with the first",
    )
    parser.add_argument(
        "--plan", type=Path, metavar="FILE", help="also the last model rounded to nearest under this plan"
    )
    parser.add_argument(
        "--perplexity", default="builtin", metavar="TEXT", help="text source, or none (default: builtin)"
    )
    parser.add_argument("--max-tokens", type=int, metavar="N", help="take about N tokens of the text (default: all)")
    parser.add_argument("--window", type=int, metavar="N", help="tokens that the model is given at a time")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="windows at a time (default: 8)")
    parser.add_argument("--tasks", default="", metavar="a,b", help="lm-eval tasks")
    parser.add_argument("--include-path", metavar="DIR", help="folder of further task definitions")
    parser.add_argument(
        "--allow-task-code", action="store_true", help="run the Python that files under --include-path name"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="items per task (default: all)")
    parser.add_argument("--num-fewshot", type=int, metavar="N", help="examples in the prompt (default: the task's own)")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes a GPU if there is one"
    )
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="of the intervals (default: 0)")
    parser.add_argument("--to", type=Path, metavar="DIR", help="write eval.json, eval.md and a log of every item here")


def run(arguments: argparse.Namespace) -> int:
    """Evaluate, print the table, and write the logs where asked."""
    from aqtx.evaluate.arms import WRITTEN, evaluate_arms
    from aqtx.evaluate.spec import EvaluateSpec
    from aqtx.machine.command_output import made_folder
    from aqtx.machine.devices import device_of
    from aqtx.registry import Context
    from aqtx.runs.arms import open_arms

    spec = EvaluateSpec(
        perplexity=None if arguments.perplexity == "none" else arguments.perplexity,
        max_tokens=arguments.max_tokens,
        window=arguments.window,
        batch_size=arguments.batch_size,
        tasks=tuple(filter(None, arguments.tasks.split(","))),
        include_path=arguments.include_path,
        allow_task_code=arguments.allow_task_code,
        limit=arguments.limit,
        num_fewshot=arguments.num_fewshot,
    )
    device = device_of(arguments.device)
    # what is in the way is told before anything is measured
    with made_folder(arguments.to, "eval", WRITTEN) if arguments.to is not None else nullcontext() as folder:
        arms = {name: program.to(device) for name, program in open_arms(arguments.models, arguments.plan).items()}
        results = evaluate_arms(arms, spec, seed=arguments.seed, progress=Context().progress)
        print(result_table(results))
        if folder is not None:
            results.write(folder)
    if arguments.to is not None:
        print(f"\n{arguments.to}")
    return 0


def result_table(results: "EvalResults") -> str:
    """A row per measure and model, with the paired difference to the first model."""
    data = results.to_json()
    rows = []
    for name, entry in data["perplexity"].items():
        change = f"{interval(entry['change'], 4, signed=True)} nats per token" if entry["change"] else ""
        rows.append(["perplexity", name, interval(entry["value"]), change])
    for task, entry in data["tasks"].items():
        for name, arm in entry["arms"].items():
            difference = interval(arm["difference"], 4, signed=True) if arm["difference"] else ""
            label = f"{task} {entry['metric']} ({entry['num_items']} items)"
            rows.append([label, name, interval(arm["value"], 4), difference])
    return format_table(["measure", "model", "value [95 %]", "difference to the first [95 %]"], rows)


COMMAND = Command(
    name="eval",
    summary="measure perplexity and lm-eval tasks of one or several models, quantized or not",
    example="aqtx eval tinymoe out/quickstart --max-tokens 20000 --to out/eval",
    add_arguments=add_arguments,
    run=run,
)
