"""Router finetuning on the shipped model at 2 bits: what the default settings recover, beyond the interval."""

import pytest

from aqtx.checkpoint.open import trace
from aqtx.evaluate.perplexity import evaluate_perplexity
from aqtx.evaluate.statistics import paired_change
from aqtx.passes.assign_plan import AssignPlan
from aqtx.passes.finetune_router import FinetuneRouter
from aqtx.passes.quantize import Quantize
from aqtx.passes.unfreeze_router import UnfreezeRouter
from aqtx.registry import Context
from aqtx.runs.pipeline import Run
from aqtx.text.calibration_spec import CalibrationSpec
from aqtx.text.tokens import calibration, evaluation, load_tokenizer


@pytest.mark.slow
def test_it_recovers_a_part_of_the_loss_at_two_bits():
    program = trace("tinymoe")
    tokenizer = load_tokenizer(program.folder)
    documents = evaluation("builtin", tokenizer, max_tokens=24_000, max_document=1025)
    ids = calibration(CalibrationSpec(num_sequences=64, sequence_length=256), tokenizer)
    run = Run(program, Context(quiet=True, load_calibration=lambda: ids))

    def score():
        return evaluate_perplexity(program.module(), documents, window=512)

    before = score()
    run.execute([AssignPlan(method="uniform", candidates=("int2",)), Quantize()])
    rounded = score()
    run.execute([UnfreezeRouter(), FinetuneRouter()])
    loss, recovered = paired_change(before, rounded), paired_change(rounded, score())
    assert loss.low > 0.05
    assert recovered.high < 0
    assert -recovered.value > 0.05 * loss.value
    assert run.rows[-1].changes.details["held_out_loss"]["change"]["high"] < 0
