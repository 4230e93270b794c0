"""Our architectures against transformers' classes, on random small configurations."""

from pathlib import Path

import pytest
import torch

from aqtx.checkpoint.huggingface.norms import shifted
from aqtx.errors import InputError
from aqtx.models import build
from aqtx.models.layers import OffsetRMSNorm
from tests.model_cases import CASES, SMALL, oracle, ours, token_ids

# Of the largest fp32 logit, which is 1 to 4: both sides sum at most a few hundred products in another order.
TOLERANCE = 2e-6


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    theirs = oracle(name)
    theirs.save_pretrained(tmp_path)
    model, ids = ours(tmp_path), token_ids(2, 19)
    with torch.no_grad():
        expected = theirs(ids).logits
        difference = (model(ids) - expected).abs().max().item()
    assert expected.std() > 0.1, "the comparison would be blind"
    assert difference <= TOLERANCE * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("name", CASES)
def test_step_continues_padded_sequences_as_scoring_does(name: str, tmp_path: Path) -> None:
    """Three chunks through the cache, left padding of two lengths: each row equals its own full score."""
    theirs = oracle(name, max_position_embeddings=64)
    theirs.save_pretrained(tmp_path)
    model, length, start = ours(tmp_path), 14, torch.tensor([0, 5])
    ids = token_ids(2, length)
    cache = model.make_cache(2, length + 3)
    with torch.no_grad():
        spans = (torch.arange(0, 9), torch.arange(9, 13), torch.arange(13, 14))
        logits = torch.cat([model(ids[:, span], span, start, cache) for span in spans], dim=1)
        alone = [model(ids[row : row + 1, int(start[row]) :])[0] for row in range(2)]
    differences = [(logits[row, int(start[row]) :] - alone[row]).abs().max().item() for row in range(2)]
    assert max(differences) <= TOLERANCE * max(1.0, float(logits.abs().max()))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope type 'longrope' is not supported"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple"),
        ({"hidden_size": None}, "hidden_size must be a positive whole number"),
        ({"model_type": "gpt_neox"}, "model_type 'gpt_neox' is not one of"),
    ],
)
def test_unsupported_settings_are_refused_by_name(settings: dict[str, object], told: str) -> None:
    with pytest.raises(InputError, match=told):
        build({"model_type": "llama", **SMALL, **settings})


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(InputError) as caught:
        build({"model_type": "llama", **SMALL, "hidden_act": "gelu", "vocab_size": "many"})
    assert len(caught.value.problems) == 2


def test_gains_stored_less_one_lose_no_digits_in_bfloat16() -> None:
    """transformers multiplies in float32 by 1 + the gain; rounded to bfloat16, 1 + the gain keeps 8 bits of it."""
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

    generator = torch.Generator().manual_seed(0)
    theirs, own = Gemma3RMSNorm(256).bfloat16(), OffsetRMSNorm(256, 1e-6).bfloat16()
    gain = (0.3 * torch.randn(256, generator=generator)).bfloat16()
    x = (3 * torch.randn(64, 256, generator=generator)).bfloat16()
    theirs.weight.data = own.weight.data = gain
    with torch.no_grad():
        assert torch.equal(own(x), theirs(x))
        assert torch.equal(shifted(x, gain, 1e-6), theirs(x))
        assert not torch.equal(torch.nn.functional.rms_norm(x, gain.shape, gain + 1, 1e-6), theirs(x))
