"""config.json without some of its keys (transformers' defaults, or refusal), and groups that make no sense."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM

from aqtx.errors import InputError
from aqtx.models import build, load_config
from tests.model_cases import CASES, LATENT, SMALL, oracle, ours, token_ids

FIRST_OF_KIND = {kind: name for name, (kind, _) in reversed(CASES.items())}
# Where families differ in what a missing key means; the settings are the defaults of transformers' classes.
DEFAULTS: dict[str, dict[str, Any]] = {
    "deepseek-v3": {"n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5, "first_k_dense_replace": 3},
    "deepseek-v2": {"n_shared_experts": 2, "first_k_dense_replace": 0, "routed_scaling_factor": 1.0},
    "glm4-moe": {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0, "first_k_dense_replace": 1},
}
TOLERANCE = 2e-6  # as in test_models.py


def without(folder: Path, whole: dict[str, Any], *keys: str) -> None:
    (folder / "config.json").write_text(json.dumps({key: value for key, value in whole.items() if key not in keys}))


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).abs().max() <= TOLERANCE * max(1.0, float(expected.abs().max())))


@pytest.mark.parametrize("name", DEFAULTS)
def test_a_family_has_its_own_defaults(name: str, tmp_path: Path) -> None:
    theirs = oracle(name, n_routed_experts=16, num_hidden_layers=4, **DEFAULTS[name])
    theirs.save_pretrained(tmp_path)
    without(tmp_path, load_config(tmp_path), *DEFAULTS[name])
    with torch.no_grad():
        assert same(ours(tmp_path)(token_ids(2, 9)), theirs(token_ids(2, 9)).logits)


@pytest.mark.slow
@pytest.mark.parametrize("name", FIRST_OF_KIND.values())
def test_any_missing_key_means_what_transformers_takes_it_for(name: str, tmp_path: Path) -> None:
    """Or is refused; keys without which transformers' model no longer takes the weights prove nothing."""
    oracle(name).save_pretrained(tmp_path)
    whole, ids = json.loads((tmp_path / "config.json").read_text()), token_ids(2, 9)
    compared, unlike = 0, []
    for key in whole.keys() - {"model_type", "tie_word_embeddings"}:  # of ties, test_tied_heads.py
        without(tmp_path, whole, key)
        try:
            theirs, told = AutoModelForCausalLM.from_pretrained(
                tmp_path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
            )
            with torch.no_grad():
                expected = theirs.eval()(ids).logits
            found = ours(tmp_path)
        except (InputError, RuntimeError, ValueError, TypeError, AssertionError, StrictDataclassError):
            continue  # neither is a model, or only ours refuses
        if any(told[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")):
            continue
        with torch.no_grad():
            unlike += [] if same(found(ids), expected) else [key]
        compared += 1
    assert compared > 10 and unlike == []


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"n_group": 5}, "n_routed_experts 8 is not a multiple of n_group 5"),
        ({"n_group": 8}, "n_group 8 makes groups of one expert"),
        ({"n_group": 4, "topk_group": 5}, "topk_group 5 is more than n_group 4"),
        ({"n_group": 4, "topk_group": 1}, "num_experts_per_tok 3 is more than the 2 experts in topk_group 1 groups"),
    ],
)
@pytest.mark.parametrize("kind", ["deepseek_v2", "deepseek_v3"])
def test_groups_out_of_which_no_experts_can_be_chosen(kind: str, settings: dict[str, Any], says: str) -> None:
    """transformers stops in the middle of a pass, or takes experts at random and weighs them 0."""
    grouped = {"topk_method": "group_limited_greedy"} if kind == "deepseek_v2" else {}
    config = SMALL | LATENT | {"model_type": kind, "topk_group": 2} | grouped | settings
    if kind == "deepseek_v2" and settings == {"n_group": 8}:  # groups that count by their best expert
        says = "num_experts_per_tok 3 is more than the 2 experts"
    with pytest.raises(InputError, match=says) as refused, torch.device("meta"):
        build(config)
    assert len(refused.value.problems) == 1


@pytest.mark.parametrize("key", ["attention_multiplier", "logits_scaling"])
def test_multipliers_of_zero_make_no_model(key: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "granitemoe", key: 0.0}))
    with pytest.raises(InputError, match=f"{key} must be a number above 0"):
        load_config(tmp_path)
