"""What training only the routers gives back after rounding: perplexity before, rounded, and trained, paired.

    python -m benchmarks.router                                   # int2, int3 and MXFP4 experts, default settings
    python -m benchmarks.router --formats int3 --set learning_rate=3e-3 --held-out-only

Experts are rounded to nearest, routers train on 512 sequences of 256 calibration tokens, and all is scored on the whole
held-out text of the shipped model. `--held-out-only` scores the held-out part of the calibration text alone: settings
are chosen there, and the evaluation text is looked at once. Finished arms stay in OUT/router.json.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import aqtx
from aqtx.evaluate.perplexity import DocumentScores, evaluate_perplexity
from aqtx.evaluate.statistics import paired_change
from aqtx.passes.assign_plan import AssignPlan
from aqtx.passes.finetune_router import FinetuneRouter
from aqtx.passes.quantize import Quantize
from aqtx.passes.unfreeze_router import UnfreezeRouter
from aqtx.registry import Context
from aqtx.report.numbers import interval
from aqtx.runs.pipeline import Run
from aqtx.text.calibration_spec import CalibrationSpec
from aqtx.text.tokens import calibration, evaluation, load_tokenizer


def measure(fmt: str, training: FinetuneRouter, text: CalibrationSpec, *, held_out_only: bool) -> dict[str, Any]:
    """Scores of the three stages, and what the pass itself saw on its held-out sequences."""
    torch.compiler.reset()  # each arm compiles its own graph, and a process may hold few
    program = aqtx.trace("tinymoe")
    assert program.folder is not None
    tokenizer = load_tokenizer(program.folder)
    ids = calibration(text, tokenizer)
    documents = evaluation("builtin", tokenizer)
    run = Run(program, Context(load_calibration=lambda: ids))
    stages = {
        "bf16": [],
        "rounded": [AssignPlan(method="uniform", candidates=(fmt,)), Quantize()],
        "trained": [UnfreezeRouter(), training],
    }
    found: dict[str, Any] = {}
    for stage, steps in stages.items():
        run.execute(steps)
        if not held_out_only:
            found[stage] = evaluate_perplexity(program.module(), documents, window=512).to_json()
    details = run.rows[-1].changes.details
    kept = ("held_out_loss", "best_step", "steps", "compiled", "layers")
    return {**found, "seconds": run.rows[-1].seconds, **{key: details[key] for key in kept}}


def print_table(found: dict[str, Any]) -> None:
    """One row a format, losses in nats per token."""
    head = ["experts", "bf16", "rounded", "cost of rounding", "change by training", "recovered", "experts changed"]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for fmt, arm in found.items():
        scores = {stage: DocumentScores.from_json(arm[stage]) for stage in ("bf16", "rounded", "trained")}
        cost = paired_change(scores["bf16"], scores["rounded"])
        change = paired_change(scores["rounded"], scores["trained"])
        shift = [
            sum(row[f"shift_{when}"] for row in arm["layers"]) / len(arm["layers"]) for when in ("before", "after")
        ]
        cells = [fmt, *(f"{scores[stage].perplexity:.3f}" for stage in ("bf16", "rounded"))]
        cells += [interval(one.to_json(), 4, signed=True) for one in (cost, change)]
        cells += [f"{-change.value / cost.value:.0%}", " to ".join(f"{share:.1%}" for share in shift)]
        print(f"| {' | '.join(cells)} |")


def main() -> None:
    """Run what is missing, print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=["int2", "int3", "mxfp4"])
    parser.add_argument("--num-sequences", type=int, default=512)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=NUMBER", help="fields of finetune_router")
    parser.add_argument("--held-out-only", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("out"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    changed = {key: json.loads(value) for key, value in (pair.split("=") for pair in arguments.set)}
    text = CalibrationSpec(num_sequences=arguments.num_sequences, sequence_length=arguments.sequence_length)
    training = replace(FinetuneRouter(), **changed)
    if arguments.held_out_only:
        for fmt in arguments.formats:
            print(fmt, json.dumps(measure(fmt, training, text, held_out_only=True)), flush=True)
        return
    file = arguments.out / "router.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    for fmt in arguments.formats:
        if fmt not in found:
            found[fmt] = measure(fmt, training, text, held_out_only=False)
            file.write_text(json.dumps(found))
    print_table(found)


if __name__ == "__main__":
    main()
