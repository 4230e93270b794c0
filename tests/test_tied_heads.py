"""A config that ties the head to the embedding, over files that hold both, one, or two that differ."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from model_cases import SMALL, randomize, token_ids
from safetensors.torch import load_file, save_file

import aqtx
from aqtx.errors import InputError

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
# two families of ours, one of which has fused experts on disk, and one that only transformers knows
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "gemma": {"head_dim": 16},
}


@pytest.fixture(params=KINDS)
def tied(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A checkpoint whose config ties and whose file holds the embedding only."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = SMALL | {"num_hidden_layers": 1, "tie_word_embeddings": True} | KINDS[request.param]
    config = AutoConfig.for_model(request.param, **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomize(model)
    model.save_pretrained(tmp_path, save_original_format=False)
    return tmp_path


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Put tensors in, or take them out."""
    found = load_file(folder / "model.safetensors") | tensors
    kept = {key: value.contiguous() for key, value in found.items() if value is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def assert_same_logits(folder: Path, program: aqtx.Program) -> None:
    from transformers import AutoModelForCausalLM

    theirs, ids = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), token_ids(2, 9)
    with torch.no_grad():
        expected = theirs(ids).logits
    # float32 over one layer: some tens of roundings of 2^-24 relative to logits of a few units
    assert (program.module()(ids) - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))


def test_a_head_with_values_of_its_own_is_read_as_transformers_reads_it(tied: Path, tmp_path: Path) -> None:
    change(tied, **{HEAD: torch.randn(SMALL["vocab_size"], SMALL["hidden_size"])})
    with pytest.warns(UserWarning, match=r"config\.json ties lm_head\.weight to model\.embed_tokens\.weight, and the"):
        program = aqtx.trace(tied)
    assert_same_logits(tied, program)
    assert not program.weights.tied
    aqtx.save(program, tmp_path / "saved")
    assert json.loads((tmp_path / "saved/config.json").read_text())["tie_word_embeddings"] is False
    ids = token_ids(1, 7)
    assert torch.equal(aqtx.load(tmp_path / "saved").module()(ids), program.module()(ids))


def test_a_head_that_equals_the_embedding_stays_tied(tied: Path) -> None:
    change(tied, **{HEAD: load_file(tied / "model.safetensors")[EMBEDDING].clone()})
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        program = aqtx.trace(tied)
    assert program.weights.tied == {HEAD: EMBEDDING}
    assert_same_logits(tied, program)


def test_a_file_without_the_embedding_is_an_error(tied: Path) -> None:
    """transformers takes the head in its place; nothing else is put there silently."""
    head = load_file(tied / "model.safetensors")[EMBEDDING].clone()
    change(tied, **{HEAD: head, EMBEDDING: None})
    with pytest.raises(InputError, match=r"tensor model\.embed_tokens\.weight is missing"):
        aqtx.trace(tied)
