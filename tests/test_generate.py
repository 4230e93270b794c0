"""Greedy generation through the cache: the tokens that transformers generates, in padded batches, also compiled."""

from pathlib import Path
from typing import Any

import pytest
import torch

import aqtx
from aqtx.program.generate import Generator
from tests.model_cases import CASES, oracle, token_ids

LENGTHS, NEW = (7, 3, 11), 9
FAST = ("olmoe", "mistral-window")


def prompts() -> list[list[int]]:
    """Prompts of unequal length."""
    return [token_ids(1, length, seed=length)[0].tolist() for length in LENGTHS]


def transformers_tokens(model: Any) -> list[list[int]]:
    """What transformers generates for each prompt alone."""
    found = []
    for prompt in prompts():
        ids = torch.tensor([prompt])
        settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        found.append(model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, len(prompt) :].tolist())
    return found


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in CASES if name not in FAST]


@pytest.mark.parametrize("name", [*FAST, *SLOW])
def test_greedy_tokens_of_a_padded_batch_equal_transformers(name: str, tmp_path: Path) -> None:
    theirs = oracle(name, max_position_embeddings=64)
    theirs.save_pretrained(tmp_path)
    made = Generator(aqtx.trace(tmp_path)).continue_greedily(prompts(), max_new_tokens=NEW)
    assert made == transformers_tokens(theirs)


def test_models_without_a_cache_entry_are_rescored() -> None:
    from test_huggingface_trace import foreign

    theirs = foreign("gpt_neox")
    made = Generator(aqtx.trace(theirs)).continue_greedily(prompts(), max_new_tokens=3)
    assert made == [tokens[:3] for tokens in transformers_tokens(theirs)]


def test_a_sequence_stops_by_itself(tmp_path: Path) -> None:
    oracle("olmoe").save_pretrained(tmp_path)
    generator = Generator(aqtx.trace(tmp_path))
    whole = generator.continue_greedily(prompts(), max_new_tokens=NEW)
    stopped = generator.continue_greedily(prompts(), max_new_tokens=NEW, stop=lambda made: len(made) == 2)
    assert stopped == [tokens[:2] for tokens in whole]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["olmoe", "qwen2-moe"])
def test_one_compile_serves_prefill_and_decoding(name: str, tmp_path: Path) -> None:
    """Counted by the compiler: four lengths of input and two of the cache run one graph."""
    theirs = oracle(name)
    theirs.save_pretrained(tmp_path)
    program = aqtx.trace(tmp_path)
    generator, compiled = Generator(program), []

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        compiled.append(graph)
        return graph

    torch._dynamo.reset()
    eager = generator.continue_greedily(prompts(), max_new_tokens=NEW)
    generator._step = torch.compile(generator._step, backend=count, fullgraph=True, dynamic=True)
    assert generator.continue_greedily(prompts(), max_new_tokens=NEW) == eager
    assert generator.continue_greedily(prompts()[:2], max_new_tokens=NEW + 2)[0][:NEW] == eager[0]
    assert len(compiled) <= 2, "one for any length, one for a single token, whose size is 1"
