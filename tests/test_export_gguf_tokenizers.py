"""Tokenizers of published families in llama.cpp's own code: the same ids as transformers' for nasty texts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter

import aqtx
from aqtx.checkpoint.exports.gguf_tokenizer import add_tokenizer, tokenizer_notes, tokenizer_problems
from aqtx.checkpoint.exports.run import export
from aqtx.errors import InputError
from aqtx.text.tokens import load_tokenizer
from tests.gguf_cases import made
from tests.llama_cpp import Model
from tests.published_tokenizers import BYTE_LEVEL, SENTENCE_PIECE, TEXTS, build


def told(folder: Path, size: int) -> Path:
    """A GGUF file with a vocabulary and no weights."""
    writer = GGUFWriter(folder / "vocabulary.gguf", "llama")
    add_tokenizer(writer, folder, size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "vocabulary.gguf"


MARKS = {text for text in TEXTS if "हिन्दी" in text or "e\u0301" in text}
NFC = {text for text in TEXTS if "e\u0301" in text}
STARTS = {text for text in TEXTS if text.startswith(" ") or "<|user|>" in text}
# texts of which llama.cpp itself makes other tokens, and why: each is told when the file is written
UNLIKE = {"qwen3": (NFC, "NFC"), "qwen3.5": (NFC, "NFC"), "mistral-v0.3": (STARTS, "puts a space before")}
UNLIKE |= dict.fromkeys(("mistral-nemo", "gpt-oss"), (MARKS, "combining marks"))


@pytest.mark.parametrize("name", [*BYTE_LEVEL, *SENTENCE_PIECE])
def test_llama_cpp_gives_the_same_ids(name: str, tmp_path: Path) -> None:
    folder, size = build(name, tmp_path)
    assert tokenizer_problems(folder, size) == []
    file, own = told(folder, size), load_tokenizer(folder)
    fields = GGUFReader(file).fields
    kind = fields["tokenizer.ggml.model"].contents(), fields["tokenizer.ggml.pre"].contents()
    assert kind == (("gpt2", BYTE_LEVEL[name][0]) if name in BYTE_LEVEL else ("llama", "default"))
    model = Model(file, vocab_only=True)
    unlike = {text for text in TEXTS if model.tokenize(text) != own.encode(text, add_special_tokens=False)}
    known, why = UNLIKE.get(name, (set(), ""))
    assert unlike == known
    assert [why in note for note in tokenizer_notes(folder)] == [True] * bool(known)
    assert model.tokenize("a b", special=True) == own.encode("a b")


def changed(folder: Path, **parts: Any) -> list[str]:
    """Problems of a tokenizer.json with other parts; those of the model begin with `model_`."""
    file = folder / "tokenizer.json"
    found = json.loads(file.read_text())
    for key, value in parts.items():
        if key.startswith("model_"):
            found["model"][key.removeprefix("model_")] = value
        else:
            found[key] = value
    file.write_text(json.dumps(found))
    return tokenizer_problems(folder, 5000)


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
OTHER = {"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": r"\p{L}+"}}, BYTES]}
REFUSED = [
    ("qwen3", {"pre_tokenizer": OTHER}, "no name for its pre-tokenizer"),
    ("qwen3", {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "no name for its pre-tokenizer"),
    ("qwen3", {"normalizer": {"type": "Lowercase"}}, "normalizes no text"),
    ("qwen3", {"model_type": "WordPiece"}, "no BPE vocabulary"),
    ("gemma3", {"normalizer": {"type": "NFKC"}}, "prepares no text"),
    ("gemma3", {"pre_tokenizer": {"type": "Whitespace"}}, "prepares no text"),
    ("gemma3", {"model_merges": [["a", "r"]]}, "no scores"),
]


@pytest.mark.parametrize(("name", "parts", "says"), REFUSED)
def test_what_llama_cpp_cannot_be_told_is_refused(name: str, parts: dict[str, Any], says: str, tmp_path: Path) -> None:
    folder, _ = build(name, tmp_path)
    [problem] = changed(folder, **parts)
    assert says in problem and "--template" in problem


def test_words_that_are_tokens_are_taken_whole_or_not_as_the_name_has_it(tmp_path: Path) -> None:
    """Where merges make every token the flag says nothing; where they do not, no name is right."""
    folder, _ = build("qwen3", tmp_path)
    assert changed(folder, model_ignore_merges=True) == []
    found = json.loads((folder / "tokenizer.json").read_text())["model"]
    unmade = found["vocab"] | {"Ġwhole": 4000}
    assert changed(folder, model_vocab=unmade, model_ignore_merges=False) == []
    [problem] = changed(folder, model_ignore_merges=True)
    assert "no name for its pre-tokenizer" in problem


def test_a_first_token_that_only_the_config_asks_for(tmp_path: Path) -> None:
    """DeepSeek's tokenizer.json puts nothing before a text; of a name that would, nothing is left to llama.cpp."""
    folder, size = build("deepseek-v3", tmp_path)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"add_bos_token": True}))
    assert Model(told(folder, size), vocab_only=True).tokenize("a", special=True)[0] == size - 3
    folder, size = build("llama3", tmp_path / "none")
    (folder / "tokenizer_config.json").write_text("{}")
    model = Model(told(folder, size), vocab_only=True)
    assert model.tokenize("a", special=True) == model.tokenize("a")


def test_a_vocabulary_larger_than_the_models_is_refused(tmp_path: Path) -> None:
    folder, size = build("gemma3", tmp_path)
    assert tokenizer_problems(folder, size - 1) == [
        f"{folder / 'tokenizer.json'} has token {size - 1}, and config.json has vocab_size {size - 1}"
    ]
    with pytest.raises(InputError, match=r"tokenizer\.json is no tokenizer's"):
        changed(folder, model_merges=[["a"]])


@pytest.mark.slow
@pytest.mark.parametrize(("case", "name"), [("gemma3_text", "gemma3"), ("gpt_oss", "gpt-oss"), ("qwen3_next", "qwen3")])
def test_exports_need_no_template(case: str, name: str, tmp_path: Path) -> None:
    folder, size = build(name, tmp_path / "source")
    ids = {"bos_token_id": size - 3, "eos_token_id": size - 2}
    made(case, folder, **(ids | {"vocab_size": size}))
    build(name, folder)
    model = Model(export(folder, "gguf", tmp_path / "model.gguf").path)
    found, own = model.tokenize(TEXTS[0]), aqtx.load(folder).module()
    assert found == load_tokenizer(folder).encode(TEXTS[0], add_special_tokens=False)
    with torch.no_grad():
        assert np.abs(model.logits(found) - own(torch.tensor([found]))[0].numpy()).max() < 0.02
