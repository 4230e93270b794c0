"""SentencePiece's BPE, as tokenizer.json spells it with merges, in the scores by which llama.cpp merges.

tokenizer.json merges the pair of lowest rank; llama.cpp the pair whose joined token has the highest score, and any
pair whose joined text is a token. Both are one where the merges of a token follow one another and every way to put
it together is among them, as transformers converts such files. Ids of tokens that break this are counted.
"""

from typing import Any

SPACE = "▁"
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_PREPEND = {"type": "Prepend", "prepend": SPACE}
_NO_SPLIT = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
_METASPACE = {"type": "Metaspace", "replacement": SPACE, "split": False}
BYTES = [f"<0x{value:02X}>" for value in range(256)]
_FEW = 1000  # one token in so many may be put together otherwise


def prefixes(told: dict[str, Any]) -> bool | None:
    """Whether a space is put before a text, None where the file is no such tokenizer."""
    model, before = told.get("model", {}), told.get("pre_tokenizer")
    plain = not any(model.get(key) for key in ("ignore_merges", "continuing_subword_prefix", "end_of_word_suffix"))
    if model.get("type") != "BPE" or not model.get("byte_fallback") or not plain:
        return None
    if any(token not in model["vocab"] for token in BYTES):
        return None
    if before is not None and before.get("type") == "Metaspace":
        scheme = before.get("prepend_scheme")
        same = {key: before.get(key) for key in _METASPACE} == _METASPACE and not normalizers(told)
        return {"first": True, "always": True, "never": False}.get(scheme) if same else None
    if before not in (None, _NO_SPLIT):  # the spaces at which it would split are gone by then
        return None
    if normalizers(told) not in ([_REPLACE], [_PREPEND, _REPLACE]):
        return None
    return len(normalizers(told)) > 1


def says(told: dict[str, Any]) -> list[str]:
    """What llama.cpp does otherwise, in sentences."""
    before, notes = told.get("pre_tokenizer") or {}, []
    if before.get("type") == "Metaspace" and prefixes(told):
        notes.append("llama.cpp puts a space before a text that begins with one, and before text behind special tokens")
    odd = strays(told)
    if odd:
        notes.append(f"llama.cpp may put {len(odd):,} of {len(told['model']['vocab']):,} tokens together otherwise")
    return notes


def fits(told: dict[str, Any]) -> bool:
    """Whether scores tell the merges, but for a few tokens."""
    return len(strays(told)) * _FEW <= len(told["model"]["vocab"])


def scores(told: dict[str, Any], tokens: list[str]) -> list[float]:
    """A score a token: minus the place of its first merge; what no merge makes comes last."""
    places: dict[str, int] = {}
    for place, pair in enumerate(merges(told)):
        places.setdefault("".join(pair), place)
    return [-float(places.get(token, len(places))) for token in tokens]


def merges(told: dict[str, Any]) -> list[tuple[str, str]]:
    """Pairs in their order, in the old and the new spelling."""
    found = (pair.split(" ") if isinstance(pair, str) else pair for pair in told["model"]["merges"])
    return [(left, right) for left, right in found]


def strays(told: dict[str, Any]) -> list[str]:
    """Tokens that scores merge otherwise: their merges do not follow one another, or a way to make them is none."""
    pairs = merges(told)
    joined = [left + right for left, right in pairs]
    apart: set[str] = set()
    seen: set[str] = set()
    for at, token in enumerate(joined):
        if token in seen and joined[at - 1] != token:
            apart.add(token)
        seen.add(token)
    ways = set(pairs)
    left_alone = {entry["content"] for entry in told.get("added_tokens", [])} | set(BYTES)

    def symbol(text: str) -> bool:
        return len(text) == 1 or text in seen

    for token in told["model"]["vocab"].keys() - left_alone:
        splits = ((token[:at], token[at:]) for at in range(1, len(token)))
        if any(symbol(left) and symbol(right) and (left, right) not in ways for left, right in splits):
            apart.add(token)
    return sorted(apart)


def normalizers(told: dict[str, Any]) -> list[dict[str, Any]]:
    """The steps of the normalizer, none where there is none."""
    whole = told.get("normalizer")
    return [] if whole is None else list(whole.get("normalizers", [whole]))
