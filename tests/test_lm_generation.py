"""Generation for lm-eval: which end of a long prompt is kept, and that a stop sequence ends it at once."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("lm_eval")

MAX_LENGTH, ROOM = 28, 12
NEW = MAX_LENGTH - ROOM
PROMPT = "The ship left the harbour in the evening, and when the sun went down the men began to sing of home. The old"
SPLIT = "In 1987, the company was"  # goes on with words of several tokens


@pytest.fixture(scope="module")
def program():
    from aqtx.checkpoint.open import trace

    return trace("tinymoe", torch.float32)


@pytest.fixture(scope="module")
def counted(program):
    """A generator that keeps the tokens it made."""
    from aqtx.program.generate import Generator

    class Counted(Generator):
        def continue_greedily(self, prompts, **settings):
            self.prompts, self.made = prompts, super().continue_greedily(prompts, **settings)
            return self.made

    return Counted(program)


@pytest.fixture(scope="module")
def model(program, counted):
    from aqtx.evaluate.lm import ProgramLM
    from aqtx.text.tokens import load_tokenizer

    tokenizer = load_tokenizer(program.folder)
    return ProgramLM(program.module(), tokenizer, max_length=MAX_LENGTH, generator=lambda: counted)


def generate(model, until: list[str], prompt: str = PROMPT) -> str:
    request = SimpleNamespace(args=(prompt, {"until": until, "max_gen_toks": NEW, "do_sample": False}))
    [text] = model.generate_until([request], disable_tqdm=True)
    return text


def test_a_long_prompt_keeps_its_right_end(program, model, counted) -> None:
    ids = model.tok_encode(PROMPT)
    assert len(ids) > ROOM
    context, expected = ids[len(ids) - ROOM :], []
    with torch.no_grad():
        for _ in range(NEW):
            expected.append(int(program.module()(torch.tensor([context + expected]))[0, -1].argmax()))
    generate(model, ["\x00never"])
    assert counted.made == [expected]


def spanned(tokenizer, tokens: list[int], word: str) -> int:
    """The tokens made when `word` first stands in their text."""
    return next(count for count in range(1, len(tokens) + 1) if word in tokenizer.decode(tokens[:count]))


def test_a_stop_sequence_that_tokens_split_otherwise_ends_generation(model, counted) -> None:
    generate(model, ["\x00never"], SPLIT)
    tokens, tokenizer = counted.made[0], model.tokenizer
    text = tokenizer.decode(tokens)
    # words that the text's tokens cut into more pieces than a tokenizer would: only looking further back finds them
    split = {}
    for start in range(len(text) - 2):
        for length in range(2, 9):
            word = text[start : start + length]
            alone, at = len(model.tok_encode(word, add_special_tokens=False)), spanned(tokenizer, tokens, word)
            if at < NEW and word not in tokenizer.decode(tokens[:at][-alone:]) and text.index(word) == start:
                split[word] = at
    assert split
    for word, at in list(split.items())[:4]:
        found = generate(model, [word], SPLIT)
        assert len(counted.made[0]) == at and found == text[: text.index(word)], word
