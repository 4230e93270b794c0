"""Plans without data: Fisher information from text, from the model's own text and from random tokens, and alpha.

    python -m benchmarks.data_free                          # the shipped model, 3.5, 3.75 and 4 bits
    python -m benchmarks.data_free --model out/smollm2 --bits 4.5 --tokens 20000 --arms text own alpha uniform

An arm plans from one source and rounds by GPTQ on one:

    text           both from the shipped calibration text, what the others are compared with
    text rounds    the same with `rounds: 2`, Fisher information measured again at the first plan's weights
    own, own4      both from text that the model wrote, as many tokens and four times as many
    own frequency  the same, its first tokens drawn by how often the model itself writes them
    own + text     plan from the model's own text, GPTQ on the shipped text
    random tokens  both from tokens drawn uniformly
    prior          by role and depth as the plan of `text` has them: what a perfect relative would know
    alpha, alphaq, uniform, random 0 and 1     GPTQ on the model's own text, as in `own`

`--foretold` prints, for the same plans rounded to nearest, what Fisher information on FORETOLD - SEQUENCES sequences of
the shipped text that no plan has seen says that they lose: sharper than a loss, since nothing but the plans differ.

All arms have equal bytes. The divergence is KL from the unrounded model's predictions on held-out text; the loss is
that of the text itself. Finished arms stay in OUT/data_free/ and are not measured again; `--only TEXT` measures
only those whose name begins so, and the same command started twice shares them.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import aqtx
from aqtx.evaluate.perplexity import evaluate_perplexity
from aqtx.numerics.intervals import bootstrap_ratio
from aqtx.passes.annotate_alpha import AnnotateAlpha
from aqtx.passes.assign_plan import AssignPlan
from aqtx.planning.arms import StudySpec
from aqtx.planning.decide import decide
from aqtx.planning.options import divide
from aqtx.registry import Context
from aqtx.report.numbers import interval
from aqtx.sensitivity.fisher import losses_along
from aqtx.sensitivity.measured import requests
from aqtx.study.plans import plan_arm
from aqtx.text import own_text
from aqtx.text.calibration_spec import CalibrationSpec
from aqtx.text.tokens import calibration, evaluation, load_tokenizer, start_of
from benchmarks.arms import file_of, measured
from benchmarks.plan_scores import WINDOW, score_plan, table

Found = dict[str, Any]
CANDIDATES = ("int2", "int3", "mxfp4", "mxfp6", "mxfp8")
SEQUENCES, LENGTH = 64, 256
FORETOLD = 480
SOURCES = ("text", "own", "own4", "own frequency", "random tokens")
# arm -> the source of its Fisher information or the method of its plan, and the source of GPTQ
ARMS = {
    **{source: (source, source) for source in SOURCES},
    "text rounds": ("text rounds", "text"),
    "own + text": ("own", "text"),
    "uniform": ("uniform", "own"),
    "alpha": ("alpha", "own"),
    "alphaq": ("alphaq", "own"),
    "prior": ("prior", "own"),
    **{f"random {seed}": (f"random {seed}", "own") for seed in range(2)},
}


@dataclass(frozen=True)
class Bench:
    """One model's arms."""

    model: str
    folder: Path
    bits: tuple[float, ...]
    max_tokens: int | None

    def text(self, source: str) -> Found:
        """Token ids of a source [n, LENGTH]."""
        program = aqtx.trace(self.model)
        assert program.folder is not None
        tokenizer = load_tokenizer(program.folder)
        count = SEQUENCES * (4 if source == "own4" else 1)
        if source == "random tokens":
            vocabulary = int(program.config["vocab_size"])
            ids = torch.randint(vocabulary, (count, LENGTH), generator=torch.Generator().manual_seed(0))
            start = start_of(tokenizer)
            ids[:, : len(start)] = torch.tensor(start, dtype=torch.long)
        elif source == "text":
            ids = calibration(CalibrationSpec(num_sequences=count, sequence_length=LENGTH), tokenizer)
        else:
            starts = "frequency" if source == "own frequency" else "uniform"
            spec = CalibrationSpec(source="self", num_sequences=count, sequence_length=LENGTH, starts=starts)
            ids = own_text.Writer(program, spec, start=start_of(tokenizer)).text(None)
        return {"ids": ids.tolist()}

    def plans(self, kind: str) -> Found:
        """A plan for each budget: by Fisher information on a source, or by a method without text."""
        program = aqtx.trace(self.model)
        method, _, seed = kind.partition(" ")
        by_fisher = kind in SOURCES
        ids = torch.tensor(self.read(f"text {kind}")["ids"]) if by_fisher else None
        context = Context(quiet=True, load_calibration=None if ids is None else lambda: ids)
        if kind == "text rounds":
            return {f"{bits:g}": self._rounds(bits) for bits in self.bits}
        if kind == "prior":
            return {f"{bits:g}": self._prior(bits) for bits in self.bits}
        if not by_fisher:
            AnnotateAlpha().run(program, context)
        settings = AssignPlan(
            method="fisher", candidates=CANDIDATES, average_bits=4.0, fisher_sequences=1 if ids is None else len(ids)
        )
        spec = StudySpec(
            methods=("fisher" if by_fisher else method,),
            reference="fisher" if by_fisher else method,
            average_bits=self.bits,
            random_seeds=2,
        )
        arms = [arm for arm in spec.arms(settings) if by_fisher or arm.seed == int(seed or 0)]
        return {f"{arm.bits:g}": plan_arm(program, arm, context)[0].to_json() for arm in arms}

    def _rounds(self, bits: float) -> Found:
        """The plan from text, made twice."""
        ids = torch.tensor(self.read("text text")["ids"])
        settings = AssignPlan(candidates=CANDIDATES, average_bits=bits, fisher_sequences=len(ids), rounds=2)
        context = Context(quiet=True, load_calibration=lambda: ids)
        return decide(aqtx.trace(self.model), settings, context).plan.to_json()

    def unseen(self) -> Found:
        """By matrix what each format loses on each unseen sequence, in nats per token: {site: {format: [...]}}."""
        program = aqtx.trace(self.model)
        assert program.folder is not None
        spec = CalibrationSpec(num_sequences=FORETOLD, sequence_length=LENGTH)
        settings = AssignPlan(candidates=CANDIDATES, average_bits=4.0)
        wanted = requests(divide(program, settings).planned, settings.formats)
        text = calibration(spec, load_tokenizer(program.folder))
        found = losses_along(program, wanted, text, Context(quiet=True))
        names = [fmt.name for fmt in settings.formats]
        return {site: dict(zip(names, losses[:, SEQUENCES:].tolist(), strict=True)) for site, losses in found.items()}

    def _prior(self, bits: float) -> Found:
        """The plan that follows the profile of the plan from text."""
        told = self.read("plans text")[f"{bits:g}"]
        settings = AssignPlan(method="prior", prior=told, candidates=CANDIDATES, average_bits=bits)
        return decide(aqtx.trace(self.model), settings, Context(quiet=True)).plan.to_json()

    def score(self, plan: str | None, source: str = "", bits: float = 0.0) -> Found:
        """Losses and divergences of each document under a plan that GPTQ carries out; without one, of the model."""
        program = aqtx.trace(self.model)
        if plan is None:
            assert program.folder is not None
            documents = evaluation("builtin", load_tokenizer(program.folder), max_tokens=self.max_tokens)
            return {"loss": evaluate_perplexity(program.module(), documents, window=WINDOW).to_json()}
        ids = torch.tensor(self.read(f"text {source}")["ids"])
        told = self.read(f"plans {plan}")[f"{bits:g}"]
        context = Context(quiet=True, load_calibration=lambda: ids)
        return score_plan(program, context, told, self.max_tokens) | {"bits": told["average_bits"]}

    def read(self, name: str) -> Found:
        """A step that is there."""
        found: Found = json.loads(file_of(self.folder, name).read_text())
        return found

    def steps(self, arms: list[str]) -> dict[str, Callable[[], Found]]:
        """Everything to measure, in an order in which each finds what it reads."""
        plans = dict.fromkeys(ARMS[arm][0] for arm in arms)
        sources = dict.fromkeys([*(plan for plan in plans if plan in SOURCES), *(ARMS[arm][1] for arm in arms)])
        found: dict[str, Callable[[], Found]] = {f"text {source}": partial(self.text, source) for source in sources}
        if "prior" in plans:
            plans = dict.fromkeys(["text", *plans])
        found |= {f"plans {plan}": partial(self.plans, plan) for plan in plans}
        found["unseen"] = self.unseen
        found["model"] = partial(self.score, None)
        for bits in self.bits:
            found |= {f"at {bits:g} {arm}": partial(self.score, *ARMS[arm], bits) for arm in arms}
        return found


def foretold(bench: Bench, arms: list[str]) -> str:
    """Markdown: a row for each plan and budget; intervals over sequences, paired with `text`."""
    losses = bench.read("unseen")
    lines = ["| bits | plan | loss foretold, thousandths of a nat | over that of `text` |", f"|{'---|' * 4}"]
    for bits in bench.bits:
        total: dict[str, np.ndarray] = {}
        for plan in dict.fromkeys(["text", *(ARMS[arm][0] for arm in arms)]):
            sites = bench.read(f"plans {plan}")[f"{bits:g}"]["sites"]
            total[plan] = sum(np.array(losses[site][sites[site]["format"]]) for site in losses)
            own = bootstrap_ratio(1000 * total[plan], np.ones(len(total[plan]))).to_json()
            over = "" if plan == "text" else interval(bootstrap_ratio(total[plan], total["text"]).to_json())
            lines.append(f"| {bits:g} | `{plan}` | {interval(own, 2)} | {over} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tinymoe")
    parser.add_argument("--bits", type=float, nargs="+", default=[3.5, 3.75, 4.0])
    parser.add_argument("--tokens", type=int, help="of held-out text (default: all)")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--only", help="measure only what begins so, and print what there is")
    parser.add_argument("--foretold", action="store_true", help="print what the plans are foretold to lose")
    parser.add_argument("--out", type=Path, default=Path("out"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = arguments.out / "data_free" / Path(arguments.model).name
    bench = Bench(arguments.model, folder, tuple(arguments.bits), arguments.tokens)
    steps = bench.steps(arguments.arms)
    only = {name: step for name, step in steps.items() if name.startswith(arguments.only or "")}
    if arguments.foretold:
        only = {name: step for name, step in steps.items() if name.startswith(("text", "plans", "unseen"))}
    measured(folder, only)
    if arguments.foretold:
        print(foretold(bench, arguments.arms))
        return
    found = measured(
        folder, {name: step for name, step in steps.items() if (folder / f"{name.replace(' ', '-')}.json").exists()}
    )
    if "model" in found and any(f"at {budget:g} text" in found for budget in bench.bits):
        print(table(found, arguments.arms, [b for b in bench.bits if f"at {b:g} text" in found], "text"))


if __name__ == "__main__":
    main()
