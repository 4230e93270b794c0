"""Our folder in transformers: refused without `import aqtx`, and loaded where modules initialize others' weights."""

import json
import subprocess
import sys

import pytest
import torch
from test_huggingface_reload import quantized, reloaded
from transformers import AutoConfig, AutoModelForCausalLM

import aqtx
from aqtx.errors import InputError
from tests.model_cases import SMALL, oracle, randomize, token_ids

LOAD = "from transformers import AutoModelForCausalLM as A; A.from_pretrained({!r})"
AFMOE = {**SMALL, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
BIGCODE = {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}


def test_without_our_import_transformers_loads_nothing_and_says_why(tmp_path):
    oracle("olmoe").save_pretrained(tmp_path / "source")
    folder = quantized(tmp_path / "quantized", tmp_path / "source")
    words = [sys.executable, "-c", LOAD.format(str(folder))]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "quantized by aqtx; `import aqtx` before loading" in done.stderr.splitlines()[-1]
    reloaded(folder)  # with the import
    again = aqtx.save(aqtx.load(folder), tmp_path / "again")
    assert (again / "config.json").read_bytes() == (folder / "config.json").read_bytes()


def test_weights_under_another_name_than_we_would_read_are_refused(tmp_path):
    oracle("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "transformers_weights": "other.safetensors"}))
    with pytest.raises(InputError, match="transformers_weights 'other"):
        aqtx.trace(tmp_path)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [pytest.param("afmoe", {**AFMOE, "num_dense_layers": 1}, marks=pytest.mark.slow), ("gpt_bigcode", BIGCODE)],
)
def test_modules_that_initialize_the_weights_of_others_load(tmp_path, kind, settings):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)).eval()
    randomize(model)
    model.save_pretrained(tmp_path / "source")
    folder, ids = quantized(tmp_path / "quantized", tmp_path / "source"), token_ids(2, 11)
    with torch.no_grad():
        found = aqtx.load(folder).module()(ids)
        assert (reloaded(folder)(ids).logits - found).abs().max() <= 2e-6 * max(1.0, float(found.abs().max()))
