"""What rotations gain: perplexity of 4-bit weights and activations with and without, paired on the same documents.

    python -m benchmarks.rotation tinymoe                       # the shipped model, which has few outliers
    python -m benchmarks.rotation tinymoe --outliers            # with outlier channels planted, same function
    python -m benchmarks.rotation out/smollm2 --tokens 100000 --formats mxfp4 int4_g32 --arms plain auto

Arms, all rounded to nearest, router and head kept, activations in the weights' format, evaluated in bfloat16:

    plain    no rotation
    blocks   a block Hadamard before every planned matrix
    auto     `rotate: auto`: where calibration text says that it helps
    fused    R1 over the residual stream at full width, R2 in the heads, blocks before down_proj
    spread   `auto` after channels were dealt out evenly over down_proj's blocks (benchmarks/spread.py)

Defaults: blocks of 32; mxfp4, int4_g32 and nvfp4; all arms but `spread`; the whole shipped evaluation text (`--tokens`
takes less) in windows of 512; planted channels 4 times as large, 3 % of each input. Choices are made on 16 sequences of
256 tokens of the shipped calibration text, which shares nothing with the evaluation text. One file an arm is kept in
OUT/rotation-NAME/ and not measured again; the same command started twice shares the arms. The baseline.json of
`benchmarks.real_model` on as many tokens may be copied there as bf16.json.
"""

import argparse
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import aqtx
from aqtx.evaluate.perplexity import DocumentScores, evaluate_perplexity
from aqtx.evaluate.statistics import paired_change
from aqtx.program.program import Program
from aqtx.registry import Context
from aqtx.runs.pipeline import Run
from aqtx.runs.recipe import build
from aqtx.text.calibration_spec import CalibrationSpec
from aqtx.text.tokens import calibration, evaluation, load_tokenizer
from benchmarks.arms import measured
from benchmarks.outliers import plant
from benchmarks.spread import spread

Step = tuple[str, dict[str, Any]]

KEEP = ["router", "shared_expert_gate", "lm_head"]
DOWN = "re:(down_proj|w2)$"
LINEARS = ["attention", "mlp_gate", "mlp_up", "mlp_down", "shared_expert"]


def arm_passes(arm: str, fmt: str, activation: str, block: int) -> list[Step]:
    """The passes of an arm."""
    plan = {"method": "uniform", "candidates": [fmt], "activations": activation, "keep": KEEP}
    if arm in ("auto", "spread"):
        plan |= {"rotate": "auto", "rotation_block": block}
        carry_out: list[Step] = [("insert_hadamard", {"before": ["plan"], "block": block}), ("fuse_hadamard", {})]
        return [("assign_plan", plan), *carry_out, ("quantize", {})]
    before: dict[str, list[Step]] = {
        "plain": [],
        "blocks": [("insert_hadamard", {"before": LINEARS, "block": block}), ("fuse_hadamard", {})],
        "fused": [
            ("fold_norms", {}),
            ("insert_hadamard", {"before": ["residual"], "block": "full"}),
            ("insert_hadamard", {"before": ["attn_o"], "block": "head"}),
            ("insert_hadamard", {"before": [DOWN], "block": block}),
            ("fuse_hadamard", {}),
        ],
    }
    return [*before[arm], ("assign_plan", plan), ("quantize", {})]


@dataclass(frozen=True)
class Setting:
    """What all arms share: the model, the factor of planted channels, tokens to evaluate, and the block."""

    model: str
    outliers: float
    tokens: int | None
    block: int


def prepared(setting: Setting, passes: list[Step], spread_channels: bool) -> tuple[Program, list[Any]]:
    """The model after an arm's passes, and their report rows."""
    program = aqtx.trace(setting.model)
    if setting.outliers > 1:
        plant(program, factor=setting.outliers)
    context = Context(quiet=True)
    assert program.folder is not None
    tokenizer = load_tokenizer(program.folder)
    context.load_calibration = lambda: calibration(CalibrationSpec(num_sequences=16, sequence_length=256), tokenizer)
    if spread_channels:
        spread(program, context, setting.block)
    run = Run(program, context)
    built = [build(name, fields, name) for name, fields in passes]
    assert not any(problems for _, problems in built), [problems for _, problems in built]
    run.execute([step for step, _ in built if step is not None])
    return program, [row.to_json() for row in run.rows]


def measure(setting: Setting, passes: list[Step], spread_channels: bool) -> dict[str, Any]:
    """Scores of one arm, and what its passes told."""
    started = time.time()
    program, rows = prepared(setting, passes, spread_channels)
    assert program.folder is not None
    documents = evaluation("builtin", load_tokenizer(program.folder), max_tokens=setting.tokens)
    scores = evaluate_perplexity(program.module(), documents, window=512)
    details = {row["name"]: row["details"] for row in rows if row["name"] in ("assign_plan", "fuse_hadamard")}
    exact = [row["max_difference"] for row in rows if row["max_difference"] is not None]
    found = {
        "scores": scores.to_json(),
        "rotation": details.get("assign_plan", {}).get("rotation"),
        "online": details.get("fuse_hadamard", {}).get("online_nodes", 0),
        "max_difference": max(exact, default=0.0),
        "seconds": round(time.time() - started),
    }
    print(
        [name for name, _ in passes], f"{scores.perplexity:.4f}", found["rotation"], found["seconds"], "s", flush=True
    )
    return found


def table(found: dict[str, Any]) -> str:
    """Markdown: perplexity, and the paired change against `plain` of the same formats."""
    scores = {name: DocumentScores.from_json(arm["scores"]) for name, arm in found.items()}
    lines = ["| arm | perplexity | change by rotation, nats a token (95 %) | nodes that run |", "|---|---|---|---|"]
    for name, arm in sorted(found.items(), key=lambda item: item[0].partition(" ")[0]):
        fmt, _, kind = name.partition(" ")
        change = ""
        if kind not in ("", "plain") and f"{fmt} plain" in scores:
            interval = paired_change(scores[f"{fmt} plain"], scores[name])
            change = f"{interval.value:+.4f} ({interval.low:+.4f} to {interval.high:+.4f})"
        lines.append(f"| {name} | {scores[name].perplexity:.3f} | {change} | {arm.get('online', 0)} |")
    return "\n".join(lines)


def main() -> None:
    """Run the arms that are not known yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--outliers", type=float, nargs="?", const=4.0, default=1.0, help="plant channels this large")
    parser.add_argument("--formats", nargs="+", default=["mxfp4", "int4_g32", "nvfp4"])
    parser.add_argument("--arms", nargs="+", default=["plain", "auto", "blocks", "fused"])
    parser.add_argument("--weights-only", action="store_true")
    parser.add_argument("--block", type=int, default=32)
    parser.add_argument("--tokens", type=int, help="of evaluation text (default: all)")
    parser.add_argument("--out", type=Path, default=Path("out"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    tags = [Path(args.model).name, f"x{args.outliers:g}" if args.outliers > 1 else "", str(args.tokens or "")]
    tags += ["weights" if args.weights_only else "", f"b{args.block}" if args.block != 32 else ""]
    setting = Setting(args.model, args.outliers, args.tokens, args.block)
    arms = {"bf16": partial(measure, setting, [], False)} | {
        f"{fmt} {arm}": partial(
            measure, setting, arm_passes(arm, fmt, "none" if args.weights_only else fmt, args.block), arm == "spread"
        )
        for arm in args.arms
        for fmt in args.formats
    }
    print(table(measured(args.out / f"rotation-{'-'.join(tag for tag in tags if tag)}", arms)))


if __name__ == "__main__":
    main()
