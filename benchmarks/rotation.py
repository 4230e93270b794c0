"""What rotations gain: perplexity of 4-bit weights and activations with and without, paired on the same documents.

    python benchmarks/rotation.py tinymoe                       # the shipped model, which has few outliers
    python benchmarks/rotation.py tinymoe --outliers            # with outlier channels planted, same function
    python benchmarks/rotation.py out/smollm2 --tokens 8000     # see benchmarks/smollm2.py

Arms, all rounded to nearest, router and head kept, activations in the weights' format:

    plain    no rotation
    blocks   a block Hadamard before every planned matrix
    auto     `rotate: auto`: where calibration text says that it helps
    fused    R1 over the residual stream at full width, R2 in the heads, blocks before down_proj

Finished arms are kept in OUT/rotation-NAME.json and not run again.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

import aqtx
from aqtx.evaluate.perplexity import DocumentScores, evaluate_perplexity
from aqtx.evaluate.statistics import paired_change
from aqtx.pipeline import Run
from aqtx.program import Program
from aqtx.registry import Context, build
from aqtx.text import CalibrationSpec, calibration, evaluation, load_tokenizer
from benchmarks.outliers import plant

KEEP = ["router", "shared_expert_gate", "lm_head"]
DOWN = "re:(down_proj|w2)$"
LINEARS = ["attention", "mlp_gate", "mlp_up", "mlp_down", "shared_expert"]


def arm_passes(arm: str, fmt: str, activation: str, block: int) -> list[tuple[str, dict[str, Any]]]:
    """The passes of an arm."""
    plan = {"method": "uniform", "candidates": [fmt], "activations": activation, "keep": KEEP}
    if arm == "auto":
        plan |= {"rotate": "auto", "rotation_block": block}
    before = {
        "plain": [],
        "blocks": [("insert_hadamard", {"before": LINEARS, "block": block}), ("fuse_hadamard", {})],
        "auto": [],
        "fused": [
            ("fold_norms", {}),
            ("insert_hadamard", {"before": ["residual"], "block": "full"}),
            ("insert_hadamard", {"before": ["attn_o"], "block": "head"}),
            ("insert_hadamard", {"before": [DOWN], "block": block}),
            ("fuse_hadamard", {}),
        ],
    }[arm]
    after = [("insert_hadamard", {"before": ["plan"], "block": block}), ("fuse_hadamard", {})] if arm == "auto" else []
    return [*before, ("assign_plan", plan), *after, ("quantize", {})]


def prepared(model: str, passes: list[tuple[str, dict[str, Any]]], outliers: float) -> tuple[Program, list[Any]]:
    """The model after an arm's passes, and their report rows."""
    program = aqtx.trace(model)
    if outliers > 1:
        plant(program, factor=outliers)
    context = Context(quiet=True)
    assert program.folder is not None
    tokenizer = load_tokenizer(program.folder)
    context.load_calibration = lambda: calibration(CalibrationSpec(num_sequences=16), tokenizer)
    run = Run(program, context)
    built = [build(name, fields, name) for name, fields in passes]
    assert not any(problems for _, problems in built), [problems for _, problems in built]
    run.execute([step for step, _ in built if step is not None])
    return program, [row.to_json() for row in run.rows]


def measure(model: str, passes: list[tuple[str, dict[str, Any]]], outliers: float, tokens: int) -> dict[str, Any]:
    """Scores of one arm, and what its passes told."""
    started = time.time()
    program, rows = prepared(model, passes, outliers)
    assert program.folder is not None
    documents = evaluation("builtin", load_tokenizer(program.folder), max_tokens=tokens)
    scores = evaluate_perplexity(program.module(), documents, window=512)
    details = {row["name"]: row["details"] for row in rows if row["name"] in ("assign_plan", "fuse_hadamard")}
    rotation = details.get("assign_plan", {}).get("rotation")
    exact = [row["max_difference"] for row in rows if row["max_difference"] is not None]
    return {
        "scores": scores.to_json(),
        "rotation": rotation,
        "online": details.get("fuse_hadamard", {}).get("online_nodes", 0),
        "max_difference": max(exact, default=0.0),
        "seconds": round(time.time() - started),
    }


def table(found: dict[str, Any]) -> str:
    """Markdown: perplexity, and the paired change against `plain` of the same formats."""
    scores = {name: DocumentScores.from_json(arm["scores"]) for name, arm in found.items()}
    lines = ["| arm | perplexity | change by rotation, nats a token (95 %) | nodes that run |", "|---|---|---|---|"]
    for name, arm in found.items():
        fmt, _, kind = name.partition(" ")
        change = ""
        if kind not in ("", "plain") and f"{fmt} plain" in scores:
            interval = paired_change(scores[f"{fmt} plain"], scores[name])
            change = f"{interval.value:+.4f} ({interval.low:+.4f} to {interval.high:+.4f})"
        lines.append(f"| {name} | {scores[name].perplexity:.3f} | {change} | {arm['online']} |")
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
    parser.add_argument("--tokens", type=int, default=30000)
    parser.add_argument("--out", type=Path, default=Path("out"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    tags = [Path(args.model).name, f"x{args.outliers:g}" if args.outliers > 1 else "", f"{args.tokens}"]
    tags += ["weights" if args.weights_only else "", f"b{args.block}" if args.block != 32 else ""]
    file = args.out / f"rotation-{'-'.join(tag for tag in tags if tag)}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    wanted = {"bf16": []} | {
        f"{fmt} {arm}": arm_passes(arm, fmt, "none" if args.weights_only else fmt, args.block)
        for fmt in args.formats
        for arm in args.arms
    }
    for name, passes in wanted.items():
        if name not in found:
            found[name] = measure(args.model, passes, args.outliers, args.tokens)
            file.write_text(json.dumps(found))
            print(
                name, f"{DocumentScores.from_json(found[name]['scores']).perplexity:.4f}", found[name]["seconds"], "s"
            )
    print(table(found))


if __name__ == "__main__":
    main()
