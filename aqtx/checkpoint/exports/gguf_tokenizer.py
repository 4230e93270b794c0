"""A byte-level BPE tokenizer, as `tokenizer.json` has it, in the keys of GGUF.

llama.cpp splits text by an expression that it knows by name, so only pre-tokenizers that are one of those can be told.
"""

import json
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType

from aqtx.errors import InputError

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {  # the expression of a Split pre-tokenizer -> llama.cpp's name of it
    rf"{_WORDS}|\p{{N}}{{1,3}}{_REST}": "llama-bpe",
    rf"{_WORDS}|\p{{N}}{_REST}": "qwen2",
}
_HINT = "give a GGUF file of the same model with --template, and its tokenizer is taken"


def tokenizer_problems(folder: Path | None) -> list[str]:
    """Why the folder's tokenizer cannot be told, in sentences."""
    if folder is None or not (folder / "tokenizer.json").is_file():
        return [f"{folder or 'the model'} has no tokenizer.json: {_HINT}"]
    told = _read(folder / "tokenizer.json")
    model = told.get("model", {})
    problems = []
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        problems.append(f"{folder / 'tokenizer.json'} is no byte-level BPE vocabulary: {_HINT}")
    elif _split_name(told) is None:
        problems.append(f"{folder / 'tokenizer.json'}: llama.cpp has no name for its pre-tokenizer: {_HINT}")
    if (told.get("normalizer") or {}).get("type", "NFC") != "NFC":
        problems.append(f"{folder / 'tokenizer.json'}: llama.cpp normalizes no text as it asks: {_HINT}")
    return problems


def add_tokenizer(writer: GGUFWriter, folder: Path, vocab_size: int) -> None:
    """Tokens, types, merges, special tokens and chat template; and the file itself, which other readers take."""
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    told = json.loads(text)
    added = {entry["id"]: entry for entry in told.get("added_tokens", [])}
    tokens, types = [f"[PAD{i}]" for i in range(vocab_size)], [TokenType.UNUSED] * vocab_size
    for token, index in told["model"]["vocab"].items():
        tokens[index], types[index] = token, TokenType.NORMAL
    for index, entry in added.items():
        tokens[index] = entry["content"]
        types[index] = TokenType.CONTROL if entry.get("special") else TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(str(_split_name(told)))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = told["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    _add_special(writer, folder, {token: index for index, token in enumerate(tokens)})
    writer.add_string("tokenizer.huggingface.json", text)


def _add_special(writer: GGUFWriter, folder: Path, ids: dict[str, int]) -> None:
    """First and last token, padding, whether a text begins with the first one, and the chat template."""
    from tokenizers import Tokenizer  # only here, and quick to import

    config = _read(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
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
                begins = Tokenizer.from_file(str(folder / "tokenizer.json")).encode("a").ids[:1] == [ids[token]]
                writer.add_add_bos_token(begins)
    template = folder / "chat_template.jinja"
    chat = template.read_text(encoding="utf-8") if template.is_file() else config.get("chat_template")
    if isinstance(chat, str):
        writer.add_chat_template(chat)


def _split_name(told: dict[str, Any]) -> str | None:
    """llama.cpp's name of how a tokenizer.json cuts text into words, None where it has none."""
    whole = told.get("pre_tokenizer") or {}
    steps = whole.get("pretokenizers", [whole])
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and steps[1].get("use_regex", True):
        return "smollm"
    if kinds == ["Split", "ByteLevel"]:
        return _SPLITS.get(steps[0].get("pattern", {}).get("Regex", ""))
    return None


def _read(file: Path) -> dict[str, Any]:
    try:
        told: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file} is not valid JSON: {error}") from None
    return told
