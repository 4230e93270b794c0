"""Calibration begins as evaluation does: with what the tokenizer puts before a text, once."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

import aqtx.text.self_sampling as ebss
from aqtx.checkpoint.open import trace
from aqtx.errors import InputError
from aqtx.text.calibration_spec import CalibrationSpec
from aqtx.text.expert_choices import Routed
from aqtx.text.tokens import calibration, evaluation, load_tokenizer, start_of
from tests.tiny import random_model

BOS, EOS = 256, 257
LETTERS = {letter: code for code, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
VOCABULARY = {**LETTERS, "<s>": BOS, "</s>": EOS}


def one_file(folder: Path, *, post_processor: bool, **config: object) -> Path:
    """A folder with tokenizer.json, as new checkpoints have it; one byte, one token."""
    made = Tokenizer(models.BPE(VOCABULARY, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(["<s>", "</s>"])
    if post_processor:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    made.save(str(folder / "tokenizer.json"))
    return configured(folder, "PreTrainedTokenizerFast", **config)


def vocabulary_files(folder: Path, **config: object) -> Path:
    """A folder of the older kind, where only tokenizer_config.json says whether a start token is put."""
    (folder / "vocab.json").write_text(json.dumps(VOCABULARY))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return configured(folder, "GPT2Tokenizer", **config)


def configured(folder: Path, kind: str, **config: object) -> Path:
    known = {"tokenizer_class": kind, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**known, **config}))
    return folder


KINDS = {
    "no BOS": (lambda folder: one_file(folder, post_processor=False), []),
    "BOS by post-processor": (lambda folder: one_file(folder, post_processor=True), [BOS]),
    "BOS by config": (lambda folder: vocabulary_files(folder, add_bos_token=True), [BOS]),
    "add_bos_token false": (lambda folder: vocabulary_files(folder, add_bos_token=False), []),
}


@pytest.fixture(params=list(KINDS))
def kind(request, tmp_path):
    make, start = KINDS[request.param]
    (tmp_path / "model").mkdir()
    return load_tokenizer(make(tmp_path / "model")), start


def written(folder: Path, rows: list[dict[str, object]]) -> str:
    file = folder / "own.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def cut(source: str, tokenizer, count: int, length: int) -> list[list[int]]:
    spec = CalibrationSpec(source=source, num_sequences=count, sequence_length=length)
    return calibration(spec, tokenizer).tolist()


def test_own_text_begins_as_evaluation_does(kind, tmp_path) -> None:
    tokenizer, start = kind
    assert start_of(tokenizer) == start
    text = "".join(chr(ord("a") + place % 26) for place in range(95))
    source = written(tmp_path, [{"text": text}])
    rows = cut(source, tokenizer, 4, 24)
    assert [row[: len(start)] for row in rows] == [start] * 4
    assert all(BOS not in row[len(start) :] for row in rows)
    body = 24 - len(start)
    plain = [LETTERS[letter] for letter in text] + [EOS]
    wanted = [plain[at : at + body] for at in range(0, 4 * body, body)]
    assert sorted(row[len(start) :] for row in rows) == sorted(wanted)
    [document] = evaluation(source, tokenizer)
    assert document.ids[: len(start) + 1].tolist() == [*start, LETTERS["a"]]


def test_builtin_text_begins_so_too(kind) -> None:
    tokenizer, start = kind
    rows = cut("builtin", tokenizer, 8, 32)
    assert [row[: len(start)] for row in rows] == [start] * 8
    assert not any(BOS in row[len(start) :] for row in rows)


def test_never_twice(tmp_path) -> None:
    """Where the text writes the start token out, and where ids of a file have it already, as self-sampled ones do."""
    tokenizer = load_tokenizer(one_file(tmp_path, post_processor=True))
    assert cut(written(tmp_path, [{"text": "<s>abc"}]), tokenizer, 1, 5) == [[BOS, *(LETTERS[x] for x in "abc"), EOS]]
    rows = [[BOS, 1, 2, 3], [BOS, 4, 5, 6], [BOS, 7, 8, 9]]
    found = cut(written(tmp_path, [{"ids": row} for row in rows]), tokenizer, 3, 4)
    assert sorted(found) == rows  # whole, none shifted into its neighbour


def test_sequences_with_room_for_the_start_only_are_refused(tmp_path) -> None:
    tokenizer = load_tokenizer(one_file(tmp_path, post_processor=True))
    tokenizer.encode = lambda text, add_special_tokens=True: [BOS, BOS] * add_special_tokens + [0]
    with pytest.raises(InputError, match="sequence_length is 2, but the tokenizer alone puts 2 tokens"):
        cut("builtin", tokenizer, 1, 2)


def test_an_end_token_is_no_start(tmp_path) -> None:
    tokenizer = load_tokenizer(one_file(tmp_path, post_processor=True))
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    assert start_of(tokenizer) == [BOS]


def test_self_sampled_text_grows_behind_the_start() -> None:
    program = trace(random_model(dtype=torch.float32))
    sampled = ebss.sample(Routed(program), num_sequences=10, length=ebss.SLOTS + 8, start=[3, 5])
    assert sampled.ids.shape == (10, ebss.SLOTS + 8)
    assert sampled.ids[:, :2].tolist() == [[3, 5]] * 10
    assert len(sampled.ids[:, 2].unique()) == 10 > ebss.PARALLEL
    assert torch.equal(ebss.usage_of(program, sampled.ids), sampled.usage)  # the cache held the start in its place
