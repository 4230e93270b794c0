"""LongRoPE of models that only transformers knows: traced on both sides of the length that they were trained for."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import aqtx
from aqtx.checkpoint.huggingface.generate import generator_of
from aqtx.checkpoint.huggingface.long_rope import traceable_long_rope
from aqtx.errors import InputError
from aqtx.passes.assign_plan import AssignPlan
from aqtx.passes.emit import Emit
from aqtx.passes.gptq import Gptq
from aqtx.program.generate import Generator
from tests.foreign_models import foreign
from tests.model_cases import token_ids

TRAINED = 12  # tokens
FACTORS = {"short_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 2.3, 2.7, 3.1], "long_factor": [1.2, 2, 3, 5, 7, 11, 19, 31]}
# spelled as published: Phi-3.5-mini has the length beside the factors, Phi-3.5-MoE among them, with scales of its own
CASES: dict[str, dict[str, Any]] = {
    "phi3": {"original_max_position_embeddings": TRAINED, "rope_scaling": {"type": "longrope"} | FACTORS},
    "phimoe": {
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "rope_scaling": {"type": "longrope", "original_max_position_embeddings": TRAINED}
        | {"long_mscale": 1.243163121016122, "short_mscale": 1.1}
        | FACTORS,
    },
}


@pytest.mark.parametrize("model_type", CASES)
def test_short_and_long_texts_score_as_transformers_has_them(model_type: str, tmp_path: Path) -> None:
    theirs = foreign(model_type, num_hidden_layers=1, **CASES[model_type])
    theirs.save_pretrained(tmp_path)
    module, logits = aqtx.trace(tmp_path).module(), {}
    for batch, length in ((2, 5), (1, TRAINED), (2, TRAINED + 1), (1, 40), (1, 1)):
        ids = token_ids(batch, length)
        with torch.no_grad():
            logits[length], own = module(ids), theirs(input_ids=ids).logits
        assert (logits[length] - own).abs().max() <= 2e-6
    beyond = (logits[40][:, :TRAINED] - logits[TRAINED]).abs().max()
    assert beyond > 1e-3, "the length reaches the logits"


@pytest.mark.slow
def test_quantized_on_texts_that_are_longer_and_generated_across_the_length(tmp_path: Path) -> None:
    foreign("phimoe", **CASES["phimoe"]).save_pretrained(tmp_path / "source")
    plan = AssignPlan(method="uniform", candidates=("int8",))
    program = aqtx.run(aqtx.trace(tmp_path / "source"), [plan, Gptq(), Emit()], calibration=token_ids(2, 24))
    aqtx.save(program, tmp_path / "saved")
    loaded = aqtx.load(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(loaded.module()(token_ids(1, 20)), program.module()(token_ids(1, 20)))
    prompts = [token_ids(1, 9)[0].tolist()]
    found = generator_of(loaded).continue_greedily(prompts, max_new_tokens=8)
    assert found == Generator(loaded).continue_greedily(prompts, max_new_tokens=8)


def test_another_arithmetic_is_refused() -> None:
    class Turned(nn.Module):
        rope_type = "longrope"

        def __init__(self, other: nn.Module) -> None:
            super().__init__()
            self.other, self.config, self.original_inv_freq = other, other.config, other.original_inv_freq

        def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            cos, sin = self.other(x, position_ids)
            return cos, -sin

    model = foreign("phi3", **CASES["phi3"])
    model.model.rotary_emb = Turned(model.model.rotary_emb)
    with pytest.raises(InputError, match=r"model\.rotary_emb: Turned computes no LongRoPE"):
        traceable_long_rope(model)
