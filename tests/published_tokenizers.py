"""Small tokenizers cut as published ones are: their tokenizer.json, with a vocabulary trained on a few lines.

The chains of pre-tokenizers are those of the models' files (as of October 2026).
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

CL = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
UP, LOW, START = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", r"[^\r\n\p{L}\p{N}]?"
LLAMA3 = CL + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + TAIL
QWEN2 = LLAMA3.replace("{1,3}", "")
QWEN35 = CL + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|" + TAIL
SIGNS = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + TAIL
TEKKEN = START + UP + "*" + LOW + "+|" + START + UP + "+" + LOW + r"*|\p{N}" + SIGNS
GPT4O = START + UP + "*" + LOW + "+" + CL + "?|" + START + UP + "+" + LOW + "*" + CL + r"?|\p{N}{1,3}" + SIGNS
DEEPSEEK = (  # its last expression has the line ends themselves, not their escapes
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|"""
    "[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)
# name -> llama.cpp's name, the Splits, whether words that are tokens are taken whole, the normalizer
BYTE_LEVEL: dict[str, tuple[str, tuple[str, ...], bool, Any]] = {
    "llama3": ("llama-bpe", (LLAMA3,), True, None),
    "glm4": ("glm4", (LLAMA3,), False, None),
    "qwen3": ("qwen2", (QWEN2,), False, {"type": "NFC"}),
    "qwen3.5": ("qwen35", (QWEN35,), False, {"type": "NFC"}),
    "mistral-nemo": ("tekken", (TEKKEN,), True, None),
    "gpt-oss": ("gpt-4o", (GPT4O,), False, None),
    "deepseek-v3": ("deepseek-v3", DEEPSEEK, False, {"type": "Sequence", "normalizers": []}),
}
SPACE = "▁"
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
PREPEND = {"type": "Prepend", "prepend": SPACE}
NO_SPLIT = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
# name -> normalizer, pre-tokenizer
SENTENCE_PIECE: dict[str, tuple[Any, Any]] = {
    "gemma3": (REPLACE, NO_SPLIT),
    "mistral-v0.1": ({"type": "Sequence", "normalizers": [PREPEND, REPLACE]}, None),
    "mistral-v0.3": (
        None,
        {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False},
    ),
}
SPECIAL = ("<unk>", "<s>", "</s>", "<|user|>")
TEXTS = (
    "It's 1,024 bytes; they'LL  pad.\n\tdef f(x):\r\n\t\treturn x_2 == 3.1415926535\n\n\n",
    "naïve café — 東京タワー 東京都 Привет, мир! 🙂🙂 ⅷ ١٢٣ 12345678 ½",
    "   leading and trailing   ",
    "\n\n \n\t\n x",
    "HTTPServer camelCase SCREAMING_SNAKE kebab-case /usr/local/bin//x C:\\dir $100 #!/bin/sh",
    "हिन्दी में नमस्ते, ไทย ภาษาไทย, עברית, العربية",
    "e\u0301 and \u200b zero width, \u00a0nbsp, \ufeffbom, 한국어 텍스트",
    "don't DON'T we'Ve I'M 'tis 'sup ''' \"quoted\"",
    "if (a<b && c>=d || !e) { return f[i]->g(); } // done",
    "a" * 40 + " " * 17 + "!" * 9 + "0" * 11,
    "",
    " ",
    "<|user|> said: <|user|>hello</s>",
)


def build(name: str, folder: Path, lines: Iterable[str] = TEXTS) -> tuple[Path, int]:
    """The folder with tokenizer.json and tokenizer_config.json of a kind, and how many tokens there are."""
    made = _byte_level(name, lines) if name in BYTE_LEVEL else _sentence_piece(name, lines)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(made, ensure_ascii=False), encoding="utf-8")
    told = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "model_max_length": 512}
    told |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    return folder, 1 + max(*made["model"]["vocab"].values(), *(entry["id"] for entry in made["added_tokens"]))


def _byte_level(name: str, lines: Iterable[str]) -> dict[str, Any]:
    _, splits, whole, normalizer = BYTE_LEVEL[name]
    steps: list[Any] = [pre_tokenizers.Split(Regex(split), "isolated") for split in splits]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, show_progress=False, initial_alphabet=alphabet, min_frequency=1)
    tokenizer.train_from_iterator(list(lines) * 2, trainer)
    told: dict[str, Any] = json.loads(tokenizer.to_str())
    told["model"]["ignore_merges"], told["normalizer"] = whole, normalizer
    size = len(told["model"]["vocab"])
    return told | {"added_tokens": [_added(token, size + at) for at, token in enumerate(SPECIAL)]}


def _sentence_piece(name: str, lines: Iterable[str]) -> dict[str, Any]:
    """Merges as transformers converts SentencePiece's files: all ways to put a token together, by the tokens' order."""
    normalizer, before = SENTENCE_PIECE[name]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=True, prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=500, show_progress=False, min_frequency=1)
    tokenizer.train_from_iterator([*lines] * 2, trainer)
    trained = json.loads(tokenizer.to_str())["model"]["vocab"]
    found = [token for token in trained if len(token) > 1] + [SPACE * count for count in range(2, 9)]
    rare = {"東", "🙂", "ⅷ", "\ufeff"}  # left to bytes
    kept = [token for token in found if not rare & set(token)]
    letters = [token for token in trained if len(token) == 1 and token not in rare | {SPACE}]
    start = [*SPECIAL, *(f"<0x{value:02X}>" for value in range(256))]
    vocab = {token: at for at, token in enumerate(dict.fromkeys([*start, *kept, SPACE, *letters]))}
    pairs = [
        (token[:at], token[at:])
        for token in vocab.keys() - set(start)
        for at in range(1, len(token))
        if token[:at] in vocab and token[at:] in vocab
    ]
    pairs.sort(key=lambda pair: (vocab["".join(pair)], vocab[pair[0]], vocab[pair[1]]))
    model = {"type": "BPE", "byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>", "vocab": vocab}
    return {
        "version": "1.0",
        "added_tokens": [_added(token, at) for at, token in enumerate(SPECIAL)],
        "normalizer": normalizer,
        "pre_tokenizer": before,
        "post_processor": _begins(),
        "model": model | {"merges": [list(pair) for pair in pairs]},
    }


def _begins() -> dict[str, Any]:
    first, text = {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    known = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
    pair = [first, text, {"Sequence": {"id": "B", "type_id": 1}}]
    return {"type": "TemplateProcessing", "single": [first, text], "pair": pair, "special_tokens": known}


def _added(token: str, index: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": token, "special": True} | flags
