"""What training the parts that stay unquantized gives back after GPTQ: losses before, rounded and trained, paired.

    python -m benchmarks.distill out/distill                                  # tinymoe, int3_g64 and MXFP4
    python -m benchmarks.distill out/distill --model out/smollm2 --formats int3_g64 --parts norm norm,attention

Every matrix but attention, router and head is rounded by the `gptq` pass with its defaults, on 64 sequences of 512
calibration tokens; what is named in --parts is trained on the same text by `distill` with its defaults. All is scored
on 100,000 held-out tokens. Finished arms stay in the folder.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch

import aqtx
from aqtx.evaluate.perplexity import DocumentScores, evaluate_perplexity
from aqtx.evaluate.statistics import paired_change
from aqtx.passes.assign_plan import AssignPlan
from aqtx.passes.distill import Distill
from aqtx.passes.gptq import Gptq
from aqtx.passes.unfreeze import Unfreeze
from aqtx.registry import Context
from aqtx.report.numbers import interval
from aqtx.runs.pipeline import Run
from aqtx.text.calibration_spec import CalibrationSpec
from aqtx.text.tokens import calibration, evaluation, load_tokenizer
from benchmarks.arms import measured

KEEP = ("attention", "router", "lm_head", "shared_expert_gate")


def measure(model: str, fmt: str | None, parts: str, distill: Distill) -> dict[str, Any]:
    """Scores of one arm; no format is the model as it is, no parts the rounded one."""
    program = aqtx.trace(model)
    assert program.folder is not None
    tokenizer = load_tokenizer(program.folder)
    ids = calibration(CalibrationSpec(num_sequences=64, sequence_length=512), tokenizer)
    run = Run(program, Context(load_calibration=lambda: ids))
    if fmt is not None:
        run.execute([AssignPlan(method="uniform", candidates=(fmt,), keep=KEEP), Gptq()])
    if parts:
        run.execute([Unfreeze(what=tuple(parts.split(","))), distill])  # type: ignore[arg-type]  (words of the user)
    details = run.rows[-1].changes.details if parts else {}
    documents = evaluation("builtin", tokenizer, max_tokens=100_000)
    return {
        "scores": evaluate_perplexity(program.module(), documents, window=512).to_json(),
        "seconds": run.rows[-1].seconds if parts else 0.0,
        **{key: details.get(key) for key in ("held_out_divergence", "best_step", "steps")},
    }


def main() -> None:
    """Measure what is missing, print a row for each arm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="tinymoe")
    parser.add_argument("--formats", nargs="+", default=["int3_g64", "mxfp4"])
    parser.add_argument("--parts", nargs="+", default=["router", "router,norm", "router,norm,attention"])
    parser.add_argument("--learning-rate", type=float, default=Distill().learning_rate)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    distill = Distill(learning_rate=arguments.learning_rate)
    wanted: list[tuple[str | None, str]] = [(None, "")]
    wanted += [(fmt, parts) for fmt in arguments.formats for parts in ("", *arguments.parts)]
    arms = {
        f"{fmt or 'bf16'} {parts or 'as rounded'} {arguments.learning_rate if parts else ''}".strip(): partial(
            measure, arguments.model, fmt, parts, distill
        )
        for fmt, parts in wanted
    }
    found = measured(arguments.folder, arms)
    scores = {name: DocumentScores.from_json(arm["scores"]) for name, arm in found.items()}
    print("| arm | loss | change by training | held-out KL, change | steps, best | s |\n|---|---|---|---|---|---|")
    for name, arm in found.items():
        rounded = scores[f"{name.split()[0]} as rounded"]
        loss = interval(paired_change(scores["bf16 as rounded"], scores[name]).to_json(), 4, signed=True)
        change = interval(paired_change(rounded, scores[name]).to_json(), 4, signed=True)
        told = arm["held_out_divergence"]
        divergence = f"{told['before']:.4f}, {interval(told['change'], 4, signed=True)}" if told else ""
        print(
            f"| {name} | {loss} | {change} | {divergence} | {arm['steps']}, {arm['best_step']} | {arm['seconds']:.0f} |"
        )


if __name__ == "__main__":
    main()
