"""The shipped model at few calibration tokens: shrinkage against plain damping, on all held-out text (slow)."""

import pytest
import torch

import aqtx
from aqtx.evaluate.perplexity import DocumentScores, evaluate_perplexity
from aqtx.evaluate.statistics import paired_change
from aqtx.passes.assign_plan import AssignPlan
from aqtx.passes.gptq import Gptq
from aqtx.program.program import Program
from aqtx.registry import Context
from aqtx.runs.pipeline import Run
from aqtx.text.calibration_spec import CalibrationSpec
from aqtx.text.tokens import Document, calibration, evaluation, load_tokenizer

FEW = CalibrationSpec(num_sequences=2, sequence_length=128)


def rounded(ids: torch.Tensor, prior: str) -> tuple[Program, list[int]]:
    """All experts at 2 bits, and the tokens that each saw."""
    run = Run(aqtx.trace("tinymoe"), Context(quiet=True, load_calibration=lambda: ids))
    run.execute([AssignPlan(method="uniform", candidates=("int2",)), Gptq(prior=prior)])
    return run.program, [row["tokens"] for row in run.rows[-1].changes.details["sites"]]


def scored(program: Program, documents: list[Document]) -> DocumentScores:
    return evaluate_perplexity(program.module(), documents, window=512)


@pytest.mark.slow
def test_shrinkage_beats_plain_damping_where_experts_starve() -> None:
    original = aqtx.trace("tinymoe")
    tokenizer = load_tokenizer(original.folder)
    few, documents = calibration(FEW, tokenizer), evaluation("builtin", tokenizer)
    plain, tokens = rounded(few, "none")
    shrunk, _ = rounded(few, "pooled")
    assert sum(count < 20 for count in tokens) >= 5  # several experts are nearly empty
    before, without, with_prior = (scored(program, documents) for program in (original, plain, shrunk))
    assert before.num_tokens.sum() >= 100_000
    gain = paired_change(without, with_prior)
    assert gain.value < 0 and gain.excludes_zero, gain
    lost = paired_change(before, without)
    assert -gain.value > 0.1 * lost.value, (gain, lost)
