"""Generation by transformers' own modules over packed weights, against the traced graph that scores the whole text."""

from pathlib import Path
from typing import Any

import pytest
import torch
from model_cases import SMALL, randomize, token_ids

import aqtx
from aqtx.checkpoint.huggingface.generate import TransformersGenerator, generator_of
from aqtx.formats import quantize
from aqtx.passes.fold_norms import FoldNorms
from aqtx.passes.insert_hadamard import InsertHadamard
from aqtx.program.generate import Generator, Sampling
from tests.marks import slow_but

MOE = {"num_local_experts": 8, "num_experts_per_tok": 2}
# experts with a cache; a state in the cache's place; biases and a partial rotation; rotations and tied embeddings
KINDS: dict[str, dict[str, Any]] = {"phimoe": MOE, "gpt_neox": {"rotary_pct": 0.5}, "gemma": {"head_dim": 16}}


def rounded(folder: Path, model_type: str) -> aqtx.Program:
    """A checkpoint of ours of a model that only transformers knows, read back; gemma's is rotated."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **(SMALL | {"num_hidden_layers": 2} | KINDS[model_type]))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    randomize(model)
    model.save_pretrained(folder / "source")
    program = aqtx.trace(folder / "source")
    if model_type == "gemma":
        aqtx.run(program, [FoldNorms(), InsertHadamard(before=("mlp_down",), block=16)])
    for place, site in enumerate(program.sites()):
        if site.category != "router" and place % 5:
            program.codes[site.name] = quantize(program.read(site), ("mxfp6", "int8_g32")[place % 2])
    program.emitted = True
    aqtx.save(program, folder / "saved")
    return aqtx.load(folder / "saved")


@pytest.mark.parametrize("model_type", slow_but(("phimoe",), KINDS))
def test_greedy_and_drawn_tokens_are_those_of_the_scoring_graph(model_type: str, tmp_path: Path) -> None:
    program = rounded(tmp_path, model_type)
    generator, rescoring = generator_of(program), Generator(program)
    assert isinstance(generator, TransformersGenerator) and not rescoring.has_cache
    prompts = [token_ids(1, 5)[0].tolist(), token_ids(1, 8, seed=1)[0].tolist()]
    found = generator.continue_greedily(prompts, max_new_tokens=6)
    assert found == rescoring.continue_greedily(prompts, max_new_tokens=6)
    assert len(set(found[0] + found[1])) > 2, "the model says one thing only"
    drawn = [
        made.continue_prompts(
            prompts[:1],
            max_new_tokens=6,
            sampling=Sampling(temperature=1.0, top_p=0.9),
            random=torch.Generator().manual_seed(3),
        )
        for made in (generator, rescoring)
    ]
    assert drawn[0] == drawn[1]


def test_a_sequence_ends_with_the_token_that_stops_it(tmp_path: Path) -> None:
    generator = generator_of(rounded(tmp_path, "phimoe"))
    prompts = [token_ids(1, 5)[0].tolist(), token_ids(1, 8, seed=1)[0].tolist()]
    whole = generator.continue_greedily(prompts, max_new_tokens=6)
    ended = generator.continue_greedily(prompts, max_new_tokens=6, stop=lambda made: made[-1] == whole[0][2])
    assert ended[0] == whole[0][: whole[0].index(whole[0][2]) + 1]
    assert ended[1] == whole[1] or ended[1][-1] == whole[0][2]


def test_our_own_families_go_on_with_their_own_step() -> None:
    assert isinstance(generator_of(aqtx.trace("tinymoe")), Generator)
