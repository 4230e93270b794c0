"""The table of results in the documents: the original's arms and ours on the shipped model, with intervals.

    python -m benchmarks.results --work out/results [--tasks-folder tasks]

HellaSwag needs local task files (see `aqtx/evaluate/task_files.py`). Arms that are there already are not run again.
"""

import argparse
import json
from pathlib import Path

import aqtx
from aqtx.evaluate.arms import evaluate_arms
from aqtx.evaluate.spec import EvaluateSpec
from aqtx.registry import Context
from aqtx.report.numbers import interval
from aqtx.runs.arms import open_arms

UNIFORM = [{"assign_plan": {"method": "uniform", "candidates": ["mxfp8"]}}, "gptq", "emit"]
# label -> recipe and overrides; the table's first row, the unquantized model, is no run
ARMS = {
    "alpha: 30 % MXFP4, 70 % MXFP8 (`alphaquant_classic`)": ("alphaquant_classic", {}),
    "uniform MXFP8": ("quickstart", {"passes": UNIFORM}),
    "ours: 5 bits (`quickstart`)": ("quickstart", {}),
}


def apply_arms(work: Path) -> dict[str, dict[str, float]]:
    """Run what is missing; sizes by label."""
    sizes = {}
    for index, (label, (recipe, overrides)) in enumerate(ARMS.items()):
        folder = work / f"arm-{index}"
        if not folder.exists():
            aqtx.apply(recipe, output=str(folder), evaluate=None, report=False, overwrite=True, **overrides)
        data = json.loads((folder / "report.json").read_text())
        share = 100 * data["bytes"]["after"] / data["bytes"]["before"]
        sizes[label] = {"planned": data["average_bits"], "model": data["average_bits_model"], "share": share}
    return sizes


def main() -> None:
    """Apply, evaluate, print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("out/results"))
    parser.add_argument("--tasks-folder")
    parser.add_argument("--limit", type=int, help="items of HellaSwag (default: all)")
    arguments = parser.parse_args()
    sizes = apply_arms(arguments.work)
    tasks = () if arguments.tasks_folder is None else ("hellaswag",)
    spec = EvaluateSpec(perplexity="builtin", tasks=tasks, include_path=arguments.tasks_folder, limit=arguments.limit)
    sources = ["bf16=tinymoe", *(f"arm-{index}={arguments.work}/arm-{index}" for index in range(len(ARMS)))]
    results = evaluate_arms(open_arms(sources), spec, progress=Context().progress)
    results.write(arguments.work / "eval")
    print_table(sizes, results.to_json())


def print_table(sizes: dict[str, dict[str, float]], data: dict[str, dict[str, dict[str, object]]]) -> None:
    """One row per arm."""
    head = [
        "",
        "bits per planned weight",
        "bits per weight",
        "size",
        "perplexity",
        "change, nats per token",
        "HellaSwag",
    ]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    nothing = {"planned": 16.0, "model": 16.0, "share": 100.0}
    for (label, size), name in zip({"BF16": nothing, **sizes}.items(), data["perplexity"], strict=True):
        text = data["perplexity"][name]
        cells = [label, f"{size['planned']:.2f}", f"{size['model']:.2f}", f"{size['share']:.1f} %"]
        cells += [interval(text["value"]), interval(text["change"], 4, signed=True) if text["change"] else ""]
        task = next(iter(data["tasks"].values()), None)
        cells.append("" if task is None else interval(task["arms"][name]["value"], 4))
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
