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
from aqtx.evaluate.perplexity import evaluate_perplexity
from aqtx.passes.assign_plan import AssignPlan
from aqtx.planning.decide import decide
from aqtx.program.program import Program
from aqtx.registry import Context
from aqtx.text.calibration_spec import CalibrationSpec
from aqtx.text.tokens import calibration, evaluation, load_tokenizer
from benchmarks.arms import file_of, measured
from benchmarks.plan_scores import WINDOW, score_plan, table

Found = dict[str, Any]
ARMS = {
    "int": ("int",),
    "mx": ("mx",),
    "mx and int": ("mx", "int"),
    "all": ("all",),
    "groups": ("groups",),
}
FIRST = "int"  # what the others are compared with
SEQUENCES, LENGTH = 64, 256


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
        program, context = self.opened()
        if arm is None:
            assert program.folder is not None
            documents = evaluation("builtin", load_tokenizer(program.folder), max_tokens=self.max_tokens)
            return {"loss": evaluate_perplexity(program.module(), documents, window=WINDOW).to_json()}
        plan = json.loads(file_of(self.folder, "plans").read_text())[arm][f"{bits:g}"]
        return score_plan(program, context, plan, self.max_tokens) | {"bits": plan["average_bits"]}


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
    print(table(measured(folder, steps), list(ARMS), bench.bits, FIRST))


if __name__ == "__main__":
    main()
