"""Checkpoints as they are published, where names and shapes on disk are not those of the model here."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

import aqtx
from tests.model_cases import CASES, SMALL, randomize, token_ids

VISION = {
    "qwen3_5_moe": {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 64},
    "gemma3": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
}
SEEING = {"qwen3-5-moe": "qwen3_5_moe", "gemma3": "gemma3"}


@pytest.mark.parametrize("name", ["gemma3", pytest.param("qwen3-5-moe", marks=pytest.mark.slow)])
def test_the_text_model_of_one_that_sees_images(name: str, tmp_path: Path) -> None:
    """config.json keeps the text model in a section; its weights have a prefix, and the tower is left out."""
    whole, text = SEEING[name], SMALL | CASES[name][1]
    vision = VISION[whole] | ({} if whole == "gemma3" else {"patch_size": 4, "num_position_embeddings": 16})
    config = AutoConfig.for_model(whole, text_config=text, vision_config=vision)
    torch.manual_seed(0)
    theirs = AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval()
    randomize(theirs)
    theirs.save_pretrained(tmp_path)
    ids = token_ids(2, 11)
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits
    with pytest.warns(UserWarning, match=r"tensors are left out, first (model\.visual|multi_modal_projector)\."):
        program = aqtx.trace(tmp_path, torch.float32)
    assert (program.module()(ids) - expected).abs().max() <= 2e-6 * max(1.0, float(expected.abs().max()))
    aqtx.save(program, tmp_path / "saved")
    saved = aqtx.load(tmp_path / "saved").weights
    assert saved.names() == program.weights.names()
    assert all(torch.equal(saved.get(name), program.weights.get(name)) for name in saved.names())
