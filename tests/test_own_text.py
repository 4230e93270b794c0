"""Text that the model writes itself: drawn from its own distribution, the same whether the run was stopped or not."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from aqtx.blockwise.block_writer import BlockWriter, writer_of
from aqtx.checkpoint.locate import locate
from aqtx.checkpoint.open import trace
from aqtx.errors import InputError
from aqtx.program.generate import Generator, Sampling
from aqtx.program.program import Program
from aqtx.runs.recipe import parse_recipe
from aqtx.text import own_text
from aqtx.text.calibration_spec import CalibrationSpec
from aqtx.text.own_text import Writer
from aqtx.text.sources import read_passages
from aqtx.text.tokens import load_tokenizer, prompt_ids
from tests.foreign_models import foreign
from tests.tiny import random_model

VOCABULARY = 192


@pytest.fixture(scope="module")
def program() -> Program:
    return trace(random_model(dtype=torch.float32))


def spec(**settings: object) -> CalibrationSpec:
    return CalibrationSpec(**{"source": "self", "num_sequences": 10, "sequence_length": 12} | settings)  # type: ignore[arg-type]


def test_first_tokens_cover_the_vocabulary_behind_the_start(program: Program) -> None:
    asked = spec(num_sequences=VOCABULARY + 5, sequence_length=4, starts="uniform")
    ids = Writer(program, asked, start=[3, 5]).text(None)
    assert ids.shape == (VOCABULARY + 5, 4)
    assert (ids[:, :2] == torch.tensor([3, 5])).all()
    assert sorted(ids[:VOCABULARY, 2].tolist()) == list(range(VOCABULARY))


def test_seeds_and_temperature_decide(program: Program) -> None:
    one, same, other = (Writer(program, spec(), seed).text(None) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    cold = Writer(program, spec(temperature=1e-4)).text(None)
    greedy = Generator(program).continue_greedily(cold[:, :1].tolist(), max_new_tokens=11)
    assert cold[:, 1:].tolist() == greedy


def test_an_interrupted_run_goes_on_with_the_same_text(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_text, "BATCH", 4)
    whole = Writer(program, spec()).text(None)

    with pytest.raises(KeyboardInterrupt):
        Writer(program, spec()).text(tmp_path, interrupted)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["self-0.jsonl", "self-1.jsonl"]
    assert torch.equal(Writer(program, spec()).text(tmp_path), whole)
    assert [file.name for file in tmp_path.iterdir()] == [own_text.FILE_NAME]
    rows = [list(passage.ids or ()) for passage in read_passages(str(tmp_path / own_text.FILE_NAME), "calibration")]
    assert rows == whole.tolist()


def interrupted(batches: range, description: str) -> Iterator[int]:
    """Two batches, then Ctrl-C."""
    yield from list(batches)[:2]
    raise KeyboardInterrupt


def test_frequent_starts_are_drawn_from_the_models_own_distribution(program: Program) -> None:
    """Against the same mean taken by scoring; of many draws each token's count is binomial."""
    probes = torch.arange(VOCABULARY).unsqueeze(-1)
    shares = program.module()(probes)[:, -1].double().softmax(-1).mean(0)
    assert torch.allclose(Generator(program).mean_next(probes), shares, atol=1e-7)
    drawn = Writer(program, spec(starts="frequency", num_sequences=4000, sequence_length=2)).text(None)
    counts = torch.bincount(drawn[:, 0], minlength=VOCABULARY)
    deviation = (4000 * shares * (1 - shares)).sqrt()
    assert ((counts - 4000 * shares).abs() < 5 * deviation).all()


def test_a_model_without_a_cache_writes_too() -> None:
    program = trace(foreign("gpt_neox"))
    ids = Writer(program, spec(num_sequences=3, sequence_length=6, temperature=1e-4)).text(None)
    greedy = Generator(program).continue_greedily(ids[:, :1].tolist(), max_new_tokens=5)
    assert ids[:, 1:].tolist() == greedy


@pytest.mark.parametrize("kind", ["own family", "without a cache"])
def test_a_model_that_does_not_fit_writes_the_same_text(
    kind: str, program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three batches grow together, each from its own numbers."""
    monkeypatch.setattr(own_text, "BATCH", 4)
    model = program if kind == "own family" else trace(foreign("gpt_neox"))
    asked = spec(starts="frequency", sequence_length=7)
    make = partial(writer_of, model, 0, tmp_path / "work", lambda items, **_: items)
    assert isinstance(make(), BlockWriter) and isinstance(writer_of(model, 1 << 40, None, make), Generator)
    whole, blocks = (
        Writer(model, asked, start=[3]).text(None),
        Writer(model, asked, start=[3], make=make).text(tmp_path),
    )
    assert torch.equal(whole, blocks)


def test_tokens_are_drawn_with_the_models_probabilities() -> None:
    logits = torch.tensor([[1.0, 0.0, -1.0, 3.0]]).expand(20_000, -1)
    for temperature in (1.0, 2.0):
        drawn = Sampling(temperature=temperature).pick(logits, torch.Generator().manual_seed(0))
        shares = torch.bincount(drawn, minlength=4) / 20_000
        expected = (logits[0] / temperature).softmax(-1)
        assert ((shares - expected).abs() < 5 * (expected * (1 - expected) / 20_000).sqrt()).all()


def test_a_nucleus_keeps_the_likeliest_tokens_and_the_one_that_reaches_it() -> None:
    logits = torch.tensor([[0.5, 0.2, 0.2, 0.1]]).log().expand(2_000, -1)
    random = torch.Generator().manual_seed(0)
    kept = {
        top_p: set(Sampling(temperature=1, top_p=top_p).pick(logits, random).tolist()) for top_p in (0.3, 0.6, 0.95)
    }
    assert kept[0.3] == {0}
    assert kept[0.6] in ({0, 1}, {0, 2})
    assert kept[0.95] == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"source": "self", "temperature": 0}, "temperature is 0"),
        ({"source": "builtin", "temperature": 0.7}, "temperature is of the source self"),
        ({"source": "builtin", "starts": "uniform"}, "starts is of the source self"),
        ({"source": "self", "starts": "often"}, "starts"),
        ({"source": "self", "tau": 1.0}, "tau is of the source ebss"),
    ],
)
def test_what_does_not_fit_the_source_is_told(settings: dict[str, object], told: str) -> None:
    with pytest.raises(InputError, match=told):
        parse_recipe({"version": 1, "model": {"source": "tinymoe"}, "calibration": settings})


def test_no_temperature_below_zero_and_no_top_p_above_one() -> None:
    with pytest.raises(InputError) as caught:
        Sampling(temperature=-1, top_p=1.5)
    assert len(caught.value.problems) == 2


def test_a_chat_prompt_is_put_into_the_models_own_template(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((locate("tinymoe") / name).read_bytes())
    with pytest.raises(InputError, match="no chat template"):
        prompt_ids(load_tokenizer(tmp_path), "hello", chat=True)
    template = "{% for turn in messages %}<{{ turn.role }}>{{ turn.content }}{% endfor %}<assistant>"
    (tmp_path / "chat_template.jinja").write_text(template)
    tokenizer = load_tokenizer(tmp_path)
    ids = prompt_ids(tokenizer, "hello", chat=True)
    assert tokenizer.decode(ids) == "<user>hello<assistant>"
    assert prompt_ids(tokenizer, "hello") == tokenizer.encode("hello")
    with pytest.raises(InputError, match="no token"):
        prompt_ids(tokenizer, "")
