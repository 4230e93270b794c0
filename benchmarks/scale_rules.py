"""What a scale rule costs weights and inputs: KL to the unrounded model with one of the two rounded, on held-out text.

    python -m benchmarks.scale_rules                                       # MX and NVFP4 of the shipped model
    python -m benchmarks.scale_rules --parts inputs --formats mxfp8 --rules floor even rceil

Every matrix but router and head is rounded to nearest by a rule, or what goes into it is, token by token; the other
stays as it is. Ratios are to the first rule of a format, paired by document. Finished arms stay in OUT/scale_rules/.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch

import aqtx
from aqtx.evaluate.divergence import evaluate_divergence
from aqtx.evaluate.perplexity import DocumentScores
from aqtx.numerics.intervals import bootstrap_ratio
from aqtx.passes.assign_plan import AssignPlan
from aqtx.passes.quantize import Quantize
from aqtx.registry import Context, Pass
from aqtx.report.numbers import interval
from aqtx.runs.pipeline import Run
from aqtx.text.tokens import evaluation, load_tokenizer
from benchmarks.arms import measured

RULES = {
    "mxfp4": ("floor", "even", "rceil", "search"),
    "mxfp6": ("floor", "even", "rceil", "search"),
    "mxfp8": ("floor", "even", "rceil", "search"),
    "nvfp4": ("amax", "search"),
}
KEEP = ("router", "lm_head")
PARTS = ("weights", "inputs")


def measure(model: str, part: str, fmt: str, tokens: int) -> dict[str, Any]:
    """Divergence of each document."""
    original, program = aqtx.trace(model), aqtx.trace(model)
    assert original.folder is not None
    documents = evaluation("builtin", load_tokenizer(original.folder), max_tokens=tokens)
    passes: list[Pass] = [AssignPlan(method="uniform", candidates=(fmt,), keep=KEEP), Quantize()]
    if part == "inputs":
        passes = [AssignPlan(method="uniform", candidates=("bf16",), activations=fmt, keep=KEEP)]
    Run(program, Context(quiet=True)).execute(passes)
    [found] = evaluate_divergence(original.module(), [program.module()], documents, window=512)
    return {"divergence": found.divergence.to_json()}


def main() -> None:
    """Run what is missing, print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tinymoe")
    parser.add_argument("--formats", nargs="+", default=list(RULES), choices=list(RULES))
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--rules", nargs="+", default=["floor", "even", "rceil", "amax", "search"])
    parser.add_argument("--tokens", type=int, default=100_000, help="of held-out text (default: 100,000)")
    parser.add_argument("--out", type=Path, default=Path("out"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    names = [(part, fmt, rule) for part in arguments.parts for fmt in arguments.formats for rule in RULES[fmt]]
    names = [name for name in names if name[-1] in arguments.rules]
    arms = {
        f"{part} {fmt}@{rule}": partial(measure, arguments.model, part, f"{fmt}@{rule}", arguments.tokens)
        for part, fmt, rule in names
    }
    found = measured(arguments.out / "scale_rules" / f"{Path(arguments.model).name}-{arguments.tokens}", arms)
    scores = {name: DocumentScores.from_json(arm["divergence"]) for name, arm in found.items()}
    print("| rounded | format | rule | KL, thousandths of a nat | over the first rule's |\n|---|---|---|---|---|")
    for part, fmt, rule in names:
        if (own := scores.get(f"{part} {fmt}@{rule}")) is None:
            continue  # another process is at it
        first = scores.get(f"{part} {fmt}@{RULES[fmt][0]}")
        ratio = "" if first is None or first is own else interval(bootstrap_ratio(own.nll, first.nll).to_json())
        value = interval(bootstrap_ratio(1000 * own.nll, own.num_tokens).to_json(), 2)
        print(f"| {part} | {fmt} | `{rule}` | {value} | {ratio} |")


if __name__ == "__main__":
    main()
