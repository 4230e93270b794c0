"""How byte-level tokenizers cut text into words, by llama.cpp's names of it.

llama.cpp has the expressions built in and is told a name. A name also stands for whether a word that is a token is
taken whole before merges are tried (`ignore_merges`), so one expression may have two names.
"""

import json
from dataclasses import dataclass
from typing import Any

_CLITICS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_START = r"[^\r\n\p{L}\p{N}]?"
_PATHS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_WORD = _START + r"\p{L}+"
_MARKED = _START + r"[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
_DEEPSEEK = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"""
    rf" ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}",
)


@dataclass(frozen=True)
class Words:
    """A name; whether words that are tokens are taken whole; what llama.cpp does otherwise, in a sentence or empty."""

    name: str
    whole: bool = False
    note: str = ""


def _cased(behind: str) -> str:
    """A word with capitals first, or all capitals; `behind` may follow it."""
    return rf"{_START}{_UPPER}*{_LOWER}+{behind}|{_START}{_UPPER}+{_LOWER}*{behind}"


_CASES = "llama.cpp cuts words at combining marks, and knows upper and lower case of ASCII letters only"
_SPLITS: dict[tuple[str, ...], tuple[Words, ...]] = {
    (rf"{_CLITICS}|{_WORD}|\p{{N}}{{1,3}}|{_SIGNS}|{_SPACES}",): (Words("llama-bpe", whole=True), Words("glm4")),
    (rf"{_CLITICS}|{_WORD}|\p{{N}}|{_SIGNS}|{_SPACES}",): (Words("qwen2"),),
    (rf"{_CLITICS}|{_MARKED}|{_SPACES}",): (Words("qwen35"),),
    (rf"{_cased('')}|\p{{N}}|{_PATHS}|{_SPACES}",): (Words("tekken", whole=True, note=_CASES),),
    (rf"{_cased(_CLITICS + '?')}|\p{{N}}{{1,3}}|{_PATHS}|{_SPACES}",): (Words("gpt-4o", note=_CASES),),
    _DEEPSEEK: (Words("deepseek-v3"),),
}

_GPT2: tuple[Words, ...] = (Words("gpt-2"),)
_DIGITS: tuple[Words, ...] = (Words("smollm"),)
_EACH_DIGIT = {"type": "Digits", "individual_digits": True}


def words_of(told: dict[str, Any]) -> Words | None:
    """How a tokenizer.json cuts text into words, None where llama.cpp has no name for it."""
    whole = told.get("pre_tokenizer") or {}
    *steps, last = whole.get("pretokenizers", [whole]) or [{}]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if last.get("use_regex", True):
        names = _GPT2 if not steps else _DIGITS if steps == [_EACH_DIGIT] else ()
    else:
        names = _SPLITS.get(tuple(_expression(step) for step in steps), ())
    wanted = bool(told["model"].get("ignore_merges"))
    found = next((words for words in names if words.whole is wanted), None)
    return found or next((words for words in names if not _matters(told)), None)


def _expression(step: dict[str, Any]) -> str:
    """What a Split keeps together; empty where it is none or does something else with it."""
    way = step.get("behavior"), bool(step.get("invert"))
    if step.get("type") != "Split" or way not in (("Isolated", False), ("Removed", True)):
        return ""
    found = str(step.get("pattern", {}).get("Regex", ""))
    return found.replace("\r", r"\r").replace("\n", r"\n")


def _matters(told: dict[str, Any]) -> bool:
    """Whether some token is no result of merges, so that taking words whole gives another text."""
    from tokenizers import Tokenizer  # only here, and quick to import

    parts = ("normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation", "padding")
    bare = dict.fromkeys(parts) | {"version": "1.0", "added_tokens": []}
    made = Tokenizer.from_str(json.dumps(bare | {"model": told["model"] | {"ignore_merges": False}}))
    added = {entry["content"] for entry in told.get("added_tokens", [])}
    tokens = [token for token in told["model"]["vocab"] if token not in added]
    return any(len(found.ids) != 1 for found in made.encode_batch(tokens, add_special_tokens=False))
