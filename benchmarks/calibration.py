"""What calibration text and its use change in GPTQ: plain, self-sampled, gate-score weighting, prior; all paired.

    python -m benchmarks.calibration                                       # int3_g32 experts of the shipped model
    python -m benchmarks.calibration --format int2 --sizes 2x128           # the prior alone, at two bits

Sizes are SEQUENCES x TOKENS, each drawn with several seeds:

    32x128   plain text; `source: ebss` at the published tau and at two that balance; weighting c and c^2 of plain text
    4x128    plain text; `source: ebss` at the same taus
    2x128    plain text with `prior: none` (plain damping) and `pooled` (the default)

The smaller taus were found on 16 sequences of 128 by sigma alone. All experts get one format, the rest stays bfloat16,
and all is scored on the whole shipped evaluation text in windows of 512. A row's losses are means over its draws; the
interval is over documents, and the last column tells how far the draws lie apart. Finished draws and arms stay in
OUT/calibration/ and are not measured again; the same command started twice shares them.
"""

import argparse
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import aqtx
from aqtx.evaluate.perplexity import DocumentScores, evaluate_perplexity
from aqtx.evaluate.statistics import paired_change
from aqtx.passes.assign_plan import AssignPlan
from aqtx.passes.gptq import Gptq
from aqtx.passes.quantize import Quantize
from aqtx.program.program import Program
from aqtx.registry import Context, Pass
from aqtx.report.numbers import interval
from aqtx.runs.pipeline import Run
from aqtx.text import self_sampling
from aqtx.text.calibration_spec import CalibrationSpec
from aqtx.text.expert_choices import Routed
from aqtx.text.tokens import Tokenizer, calibration, evaluation, load_tokenizer
from benchmarks.arms import measured

Found = dict[str, dict[str, Any]]

SEEDS = {"32x128": range(2), "4x128": range(3), "2x128": range(2)}


@dataclass(frozen=True)
class Row:
    """A text (`builtin`, or ebss at a tau) and how GPTQ uses it; the first row of a size is what others compare to."""

    tau: float | None = None
    gptq: dict[str, str] = field(default_factory=dict)

    def text(self, size: str, seed: int) -> str:
        """Name of one draw."""
        return f"{'builtin' if self.tau is None else f'ebss_{self.tau:g}'} {size} {seed}"

    def arm(self, size: str, seed: int) -> str:
        """Name of one rounded model."""
        return " ".join([self.text(size, seed), *self.gptq.values()])

    def __str__(self) -> str:
        words = ["plain text" if self.tau is None else f"ebss, tau {self.tau:g}"]
        return ", ".join(words + [f"{key} {value}" for key, value in self.gptq.items()])


TEXTS = [Row(), Row(1.2), Row(1e-3), Row(1e-4)]
WEIGHTINGS = [Row(gptq={"weighting": weighting}) for weighting in ("score", "squared_score")]
PRIORS = [Row(gptq={"prior": prior}) for prior in ("none", "pooled")]
ROWS = {"32x128": TEXTS + WEIGHTINGS, "4x128": TEXTS, "2x128": PRIORS}


def opened() -> tuple[Program, Tokenizer]:
    """The shipped model and its tokenizer."""
    program = aqtx.trace("tinymoe")
    assert program.folder is not None
    return program, load_tokenizer(program.folder)


def draw(row: Row, size: str, seed: int) -> dict[str, Any]:
    """Calibration ids [SEQUENCES, TOKENS], the seconds that they took, and how evenly they use the experts."""
    program, tokenizer = opened()
    num_sequences, length = map(int, size.split("x"))
    source = "builtin" if row.tau is None else "ebss"
    spec = CalibrationSpec(source=source, num_sequences=num_sequences, sequence_length=length, tau=row.tau)
    started = time.perf_counter()
    if row.tau is None:
        ids = calibration(spec, tokenizer, seed)
    else:
        ids = self_sampling.calibration(spec, seed, None, partial(Routed, program))
    seconds = time.perf_counter() - started
    usage = self_sampling.usage_of(program, ids)  # [L, E]
    share = usage / usage.sum(-1, keepdim=True)
    balance = {
        "sigma": self_sampling.deviation(usage),
        "largest": share.max(),
        "smallest": share.min(),
        "emptiest": usage.min(),
    }
    return {"ids": ids.tolist(), "seconds": seconds, **{name: float(value) for name, value in balance.items()}}


def score(passes: list[Pass], ids: list[list[int]] | None = None) -> dict[str, Any]:
    """Scores of the model after passes that read `ids`."""
    program, tokenizer = opened()
    run = Run(program, Context(quiet=True, load_calibration=lambda: torch.tensor(ids)))
    run.execute(passes)
    scores = evaluate_perplexity(program.module(), evaluation("builtin", tokenizer), window=512)
    return {"scores": scores.to_json(), "seconds": run.rows[-1].seconds if run.rows else 0.0}


def balance_table(sizes: list[str], draws: Found) -> str:
    """Markdown: one row a text and size, means over draws."""
    lines = [
        "| tokens | calibration | sigma | largest share | smallest share | tokens of the emptiest expert | seconds |",
        f"|{'---|' * 7}",
    ]
    for size in sizes:
        for row in ROWS[size]:
            if row.gptq:
                continue
            found = [draws[row.text(size, seed)] for seed in SEEDS[size]]
            keys = {"sigma": ".4f", "largest": ".3f", "smallest": ".4f", "emptiest": ".0f", "seconds": ".1f"}
            cells = [f"{np.mean([one[key] for one in found]):{digits}}" for key, digits in keys.items()]
            lines.append(f"| {size} | {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def loss_table(sizes: list[str], arms: Found) -> str:
    """Markdown: nats per token lost to rounding, and the paired change against the first row of each size."""
    scores = {name: DocumentScores.from_json(arm["scores"]) for name, arm in arms.items()}
    lines = [
        "| tokens | GPTQ with | perplexity | cost of rounding, nats | change by it, nats | change in each draw |",
        f"|{'---|' * 6}",
        f"| | bfloat16 | {scores['bf16'].perplexity:.3f} | | | |",
        f"| | no calibration: to nearest | {scores['nearest'].perplexity:.3f}"
        f" | {scores['nearest'].mean - scores['bf16'].mean:+.4f} | | |",
    ]
    for size in sizes:
        first = [scores[ROWS[size][0].arm(size, seed)] for seed in SEEDS[size]]
        for row in ROWS[size]:
            own = [scores[row.arm(size, seed)] for seed in SEEDS[size]]
            mean = averaged(own)
            cells = [size, str(row), f"{mean.perplexity:.3f}", f"{mean.mean - scores['bf16'].mean:+.4f}", "", ""]
            if row is not ROWS[size][0]:
                cells[4] = interval(paired_change(averaged(first), mean).to_json(), 4, signed=True)
                cells[5] = ", ".join(f"{one.mean - base.mean:+.4f}" for base, one in zip(first, own, strict=True))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def averaged(draws: list[DocumentScores]) -> DocumentScores:
    """Scores with each document's mean loss over draws."""
    one = draws[0]
    return DocumentScores(
        one.domains, np.mean([found.nll for found in draws], 0), one.num_tokens, one.window, one.context
    )


def main() -> None:
    """Run what is missing, print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", default="int3_g32")
    parser.add_argument("--sizes", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--out", type=Path, default=Path("out"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sizes, folder = arguments.sizes, arguments.out / "calibration"
    cases = [(row, size, seed) for size in sizes for row in ROWS[size] for seed in SEEDS[size]]
    draws = measured(folder, {row.text(size, seed): partial(draw, row, size, seed) for row, size, seed in cases})
    plan = AssignPlan(method="uniform", candidates=(arguments.format,))
    arms = {"bf16": partial(score, []), "nearest": partial(score, [plan, Quantize()])}
    for row, size, seed in cases:
        if text := draws.get(row.text(size, seed)):
            gptq = Gptq(**row.gptq)  # type: ignore[arg-type]
            arms[row.arm(size, seed)] = partial(score, [plan, gptq], text["ids"])
    found = measured(folder / arguments.format, arms)
    if len(found) < len(cases) + 2:
        print("another process is at the rest")
        return
    if compared := [size for size in sizes if ROWS[size] is not PRIORS]:
        print(balance_table(compared, draws), end="\n\n")
    print(loss_table(sizes, found))


if __name__ == "__main__":
    main()
