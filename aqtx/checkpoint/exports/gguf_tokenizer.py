"""A BPE tokenizer, byte-level or SentencePiece's, as `tokenizer.json` has it, in the keys of GGUF."""

import json
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType

from aqtx.checkpoint.exports import gguf_sentencepiece as pieces
from aqtx.checkpoint.exports.gguf_pre_tokenizers import words_of
from aqtx.errors import InputError, malformed

_HINT = "give a GGUF file of the same model with --template, and its tokenizer is taken"


def tokenizer_problems(folder: Path | None, vocab_size: int | None) -> list[str]:
    """Why the folder's tokenizer cannot be told for a model of so many tokens, in sentences."""
    if folder is None or not (folder / "tokenizer.json").is_file():
        return [f"{folder or 'the model'} has no tokenizer.json: {_HINT}"]
    file = folder / "tokenizer.json"
    told = _read(file)
    with malformed(f"{file} is no tokenizer's"):
        problems = [f"{file}{sentence}: {_HINT}" for sentence in _unknown(told)]
        largest = max([*told["model"]["vocab"].values(), *_added(told)], default=0)
    if vocab_size is not None and largest >= vocab_size:
        problems.append(f"{file} has token {largest}, and config.json has vocab_size {vocab_size}")
    return problems


def _unknown(told: dict[str, Any]) -> list[str]:
    """What of a tokenizer.json has no words in GGUF."""
    model = told["model"]
    if model.get("type") != "BPE":
        return [" is no BPE vocabulary"]
    if pieces.prefixes(told) is not None:
        return [] if pieces.fits(told) else [": no scores of tokens stand for its merges"]
    if model.get("byte_fallback"):
        return [": llama.cpp prepares no text for SentencePiece's tokens as it asks"]
    problems = [] if words_of(told) else [": llama.cpp has no name for its pre-tokenizer"]
    if any(step.get("type") != "NFC" for step in pieces.normalizers(told)):
        problems.append(": llama.cpp normalizes no text as it asks")
    return problems


def tokenizer_notes(folder: Path) -> list[str]:
    """What llama.cpp does otherwise, in sentences."""
    told = _read(folder / "tokenizer.json")
    if pieces.prefixes(told) is not None:
        return pieces.says(told)
    words = words_of(told)
    notes = [words.note] if words is not None and words.note else []
    return notes + ["llama.cpp joins no letters and marks (NFC) before it cuts a text"] * bool(pieces.normalizers(told))


def add_tokenizer(writer: GGUFWriter, folder: Path, vocab_size: int) -> None:
    """Tokens, types, merges or scores, special tokens and chat template; and the file itself, for other readers."""
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    told = json.loads(text)
    tokens, types = _tokens(told, vocab_size)
    prefix = pieces.prefixes(told)
    writer.add_tokenizer_model("gpt2" if prefix is None else "llama")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if prefix is None:
        words = words_of(told)
        assert words is not None  # `tokenizer_problems` was asked
        writer.add_tokenizer_pre(words.name)
        writer.add_token_merges([" ".join(pair) for pair in pieces.merges(told)])
    else:
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(pieces.scores(told, tokens))
        writer.add_add_space_prefix(prefix)
    _add_special(writer, folder, {token: index for index, token in enumerate(tokens)})
    writer.add_string("tokenizer.huggingface.json", text)


def _tokens(told: dict[str, Any], vocab_size: int) -> tuple[list[str], list[TokenType]]:
    """Texts and types by id; what no token has is unused."""
    tokens, types = [f"[PAD{i}]" for i in range(vocab_size)], [TokenType.UNUSED] * vocab_size
    model = told["model"]
    for token, index in model["vocab"].items():
        if types[index] is TokenType.BYTE:  # Gemma has the tab twice, and its byte is the one that is looked for
            continue
        is_byte = model.get("byte_fallback") and token in _BYTES
        tokens[index], types[index] = token, TokenType.BYTE if is_byte else TokenType.NORMAL
    for index, entry in _added(told).items():
        tokens[index] = entry["content"]
        types[index] = TokenType.CONTROL if entry.get("special") else TokenType.USER_DEFINED
    if model.get("byte_fallback") and model.get("unk_token") in model["vocab"]:
        types[model["vocab"][model["unk_token"]]] = TokenType.UNKNOWN
    return tokens, types


_BYTES = frozenset(pieces.BYTES)


def _added(told: dict[str, Any]) -> dict[int, dict[str, Any]]:
    return {entry["id"]: entry for entry in told.get("added_tokens", [])}


def _add_special(writer: GGUFWriter, folder: Path, ids: dict[str, int]) -> None:
    """First and last token, padding, whether a text begins with the first one, and the chat template."""
    from tokenizers import Tokenizer  # only here, and quick to import

    config = _read(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    begins = False
    for key, add in (
        ("bos_token", writer.add_bos_token_id),
        ("eos_token", writer.add_eos_token_id),
        ("pad_token", writer.add_pad_token_id),
        ("unk_token", writer.add_unk_token_id),
    ):
        token = config.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        if token in ids:
            add(ids[token])
            if key == "bos_token":
                first = Tokenizer.from_file(str(folder / "tokenizer.json")).encode("a").ids[:1]
                begins = first == [ids[token]] or config.get("add_bos_token") is True
    writer.add_add_bos_token(begins)  # some names of pre-tokenizers would otherwise add one that there is not
    template = folder / "chat_template.jinja"
    chat = template.read_text(encoding="utf-8") if template.is_file() else config.get("chat_template")
    if isinstance(chat, str):
        writer.add_chat_template(chat)


def _read(file: Path) -> dict[str, Any]:
    try:
        told: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file} is not valid JSON: {error}") from None
    return told
