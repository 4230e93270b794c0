"""Which formats a budget should choose from: plans by Fisher information over sets of candidates, rounded by GPTQ.

    python -m benchmarks.candidates                               # the shipped model at 3.5, 4.25 and 5 bits
    python -m benchmarks.candidates --model out/smollm2 --bits 4.25 --tokens 20000

    int           groups of 64 of 3, 4, 6 and 8 bits (the set `int`)
    mx            MXFP4, MXFP6, MXFP8 (the set `mx`)
    mx and int    both
    all           both with NVFP4 (the set `all`)
    groups        integers of 2 to 8 bits in groups of 32, 64 and 128 (the set `groups`)

All arms of a budget have at most its bytes; one that has no plan so small is left out. The information and GPTQ come
from the same 64 sequences of 256 tokens of the shipped calibration text. The divergence is KL from the unrounded
model's predictions on held-out text, and the loss that of the text itself. Finished arms stay in OUT/candidates/.
"""

import argparse
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import aqtx
from aqtx.errors import InputError
from aqtx.evaluate.divergence import evaluate_divergence
from aqtx.evaluate.perplexity import DocumentScores, evaluate_perplexity
from aqtx.evaluate.statistics import paired_change
from aqtx.numerics.intervals import bootstrap_ratio
from aqtx.passes.assign_plan import AssignPlan
from aqtx.passes.gptq import Gptq
from aqtx.planning.decide import decide
from aqtx.program.program import Program
from aqtx.registry import Context
from aqtx.report.numbers import interval
from aqtx.runs.pipeline import Run
from aqtx.text.calibration_spec import CalibrationSpec
from aqtx.text.tokens import calibration, evaluation, load_tokenizer
from benchmarks.arms import file_of, measured

Found = dict[str, Any]
ARMS = {
    "int": ("int",),
    "mx": ("mx",),
    "mx and int": ("mx", "int"),
    "all": ("all",),
    "groups": ("groups",),
}
FIRST = "int"  # what the others are compared with
SEQUENCES, LENGTH, WINDOW = 64, 256, 512


@dataclass(frozen=True)
class Bench:
    """One model's arms."""

    model: str
    folder: Path
    bits: tuple[float, ...]
    max_tokens: int | None

    def opened(self) -> tuple[Program, Context]:
        """The model, and a context with the calibration text."""
        program = aqtx.trace(self.model)
        assert program.folder is not None
        ids = calibration(
            CalibrationSpec(num_sequences=SEQUENCES, sequence_length=LENGTH), load_tokenizer(program.folder)
        )
        return program, Context(quiet=True, load_calibration=lambda: ids)

    def plans(self) -> Found:
        """{arm: {bits: plan}}, the information measured once for all formats."""
        program, context = self.opened()
        found: Found = {arm: {} for arm in ARMS}
        for arm, candidates in ARMS.items():
            for bits in self.bits:
                settings = AssignPlan(candidates=candidates, average_bits=bits, fisher_sequences=SEQUENCES)
                try:
                    found[arm][f"{bits:g}"] = decide(program, settings, context).plan.to_json()
                except InputError as error:
                    print(f"{arm} at {bits:g} bits: {error}")
        return found

    def score(self, arm: str | None, bits: float = 0.0) -> Found:
        """Losses and divergences of each document under an arm's plan; without one, losses of the model."""
        original = aqtx.trace(self.model)
        assert original.folder is not None
        documents = evaluation("builtin", load_tokenizer(original.folder), max_tokens=self.max_tokens)
        if arm is None:
            return {"loss": evaluate_perplexity(original.module(), documents, window=WINDOW).to_json()}
        plan = json.loads(file_of(self.folder, "plans").read_text())[arm][f"{bits:g}"]
        program, context = self.opened()
        Run(program, context).execute([AssignPlan(method="manual", plan=plan), Gptq()])
        [found] = evaluate_divergence(original.module(), [program.module()], documents, window=WINDOW)
        return {"loss": found.loss.to_json(), "divergence": found.divergence.to_json(), "bits": plan["average_bits"]}


def table(found: dict[str, Found], budgets: tuple[float, ...]) -> str:
    """Markdown: a row for each budget and arm, those with ratios and changes paired with the first."""
    lines = [
        f"| bits | candidates | stored bits | divergence, thousandths of a nat | over that of `{FIRST}` "
        "| change of loss | change against it |",
        f"|{'---|' * 7}",
    ]
    before = DocumentScores.from_json(found["model"]["loss"])
    for budget in budgets:
        rows = {arm: found[f"at {budget:g} {arm}"] for arm in ARMS if f"at {budget:g} {arm}" in found}
        scores = {arm: DocumentScores.from_json(row["divergence"]) for arm, row in rows.items()}
        losses = {arm: DocumentScores.from_json(row["loss"]) for arm, row in rows.items()}
        for arm, row in rows.items():
            own = bootstrap_ratio(1000 * scores[arm].nll, scores[arm].num_tokens)
            cells = [f"{budget:g}", arm, f"{row['bits']:.3f}", interval(own.to_json(), 2), ""]
            cells += [interval(paired_change(before, losses[arm]).to_json(), 4, signed=True), ""]
            if arm != FIRST and FIRST in rows:
                cells[4] = interval(bootstrap_ratio(scores[arm].nll, scores[FIRST].nll).to_json())
                cells[6] = interval(paired_change(losses[FIRST], losses[arm]).to_json(), 4, signed=True)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tinymoe")
    parser.add_argument("--bits", type=float, nargs="+", default=[3.5, 4.25, 5.0])
    parser.add_argument("--tokens", type=int, default=100_000, help="of held-out text (default: 100,000)")
    parser.add_argument("--out", type=Path, default=Path("out"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = arguments.out / "candidates" / Path(arguments.model).name
    bench = Bench(arguments.model, folder, tuple(arguments.bits), arguments.tokens)
    plans = measured(folder, {"plans": bench.plans})["plans"]
    steps = {"model": partial(bench.score, None)}
    for bits in bench.bits:
        steps |= {f"at {bits:g} {arm}": partial(bench.score, arm, bits) for arm in ARMS if f"{bits:g}" in plans[arm]}
    print(table(measured(folder, steps), bench.bits))


if __name__ == "__main__":
    main()
