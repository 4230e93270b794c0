"""Text to tokens: calibration sequences of one length, and evaluation documents by domain.

Calibration text is never padded: passages are tokenised in a seeded order, joined by the end-of-text token where the
tokenizer has one, and cut into sequences that do not overlap, so that every row counts and no token counts twice.
Each sequence begins with what the tokenizer puts before a text (`start_of`), as every evaluation document does: a
model that was trained behind a start token computes something else without it, and calibration must not measure that.
Domains take turns, so each has an equal share as long as its text lasts.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from aqtx.errors import InputError, malformed
from aqtx.machine.files import read_json
from aqtx.text.calibration_spec import CalibrationSpec
from aqtx.text.sources import Passage, read_passages

T = TypeVar("T")
_OBJECTS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_PROBE = "a"  # any text will do


class Tokenizer(Protocol):
    """What is asked of a tokenizer; those of transformers have it."""

    eos_token_id: int | None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, with the special tokens that the tokenizer itself adds, or without."""

    def decode(self, token_ids: list[int]) -> str:
        """The text of token ids."""

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, add_generation_prompt: bool, tokenize: bool
    ) -> str:
        """A conversation as the model was trained to read it."""


@dataclass(frozen=True)
class Document:
    """One evaluation document: its domain and its token ids."""

    domain: str
    ids: torch.Tensor  # int64 [length]


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer that lies in a model folder, as transformers reads it; no remote code is ever run."""
    import transformers

    if not any(folder.glob("tokenizer*")):
        raise InputError(f"{folder} holds no tokenizer (tokenizer.json), so text cannot be read for this model")
    for name in _OBJECTS:
        if (folder / name).exists() and not isinstance(read_json(folder / name), dict):
            raise InputError(f"{folder / name} holds no JSON object, which a tokenizer's file is")
    with malformed(f"{folder}: the tokenizer cannot be read"):
        # without an answer beforehand, code that comes with a tokenizer is asked about at the terminal
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        # A document longer than the model's context is cut into windows here, so the tokenizer need not warn about it.
        tokenizer.model_max_length = 10**30
        _try_out(tokenizer)
    found: Tokenizer = tokenizer
    return found


def _try_out(tokenizer: Any) -> None:
    """Use a tokenizer once: some files are only found out by their first word."""
    ids, end = tokenizer.encode(_PROBE), tokenizer.eos_token_id
    if not all(type(token) is int and token >= 0 for token in [*ids, *([] if end is None else [end])]):
        raise ValueError("it gives no token ids")
    tokenizer.decode(ids)


def prompt_ids(tokenizer: Tokenizer, text: str, *, chat: bool = False) -> list[int]:
    """Token ids of a prompt; with `chat` as the user's turn of the model's own chat template.

    Raises:
        InputError: the prompt holds no token, or the tokenizer has no chat template.
    """
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise InputError("the prompt holds half a surrogate pair, which is no character")
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise InputError("--chat: the model's tokenizer has no chat template")
        turns = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    ids = tokenizer.encode(text, add_special_tokens=not chat)  # a template writes its special tokens itself
    if not ids:
        raise InputError("the prompt holds no token")
    return ids


def start_of(tokenizer: Tokenizer) -> list[int]:
    """The ids that the tokenizer itself puts before every text: mostly one start token or none.

    Told by encoding, whatever makes it so: a post-processor, `add_bos_token` in the tokenizer's configuration, code.
    """
    plain = tokenizer.encode(_PROBE, add_special_tokens=False)
    marked = tokenizer.encode(_PROBE, add_special_tokens=True)
    length = next(at for at in range(len(marked) + 1) if marked[at : at + len(plain)] == plain or at == len(marked))
    return marked[:length] if length < len(marked) else []


def check_room(spec: CalibrationSpec, start: Sequence[int]) -> None:
    """InputError where sequences are too short to hold anything behind `start`."""
    if spec.sequence_length <= len(start):
        raise InputError(
            f"calibration: sequence_length is {spec.sequence_length}, but the tokenizer alone puts {len(start)} "
            "tokens before a text"
        )


def calibration(
    spec: CalibrationSpec,
    tokenizer: Tokenizer,
    seed: int = 0,
    *,
    progress: Callable[[Iterator[int]], Iterator[int]] = iter,
) -> torch.Tensor:
    """Calibration sequences, int64 [num_sequences, sequence_length], of one source; the same ones for the same seed."""
    return calibration_by_domain(spec, tokenizer, seed, progress=progress)[0]


def calibration_by_domain(
    spec: CalibrationSpec,
    tokenizer: Tokenizer,
    seed: int = 0,
    *,
    progress: Callable[[Iterator[int]], Iterator[int]] = iter,
) -> tuple[torch.Tensor, tuple[str, ...]]:
    """The same, and the domain of each sequence."""
    start = start_of(tokenizer)
    check_room(spec, start)
    if not isinstance(spec.source, str):
        raise InputError("calibration of several sources is read part by part")
    by_domain = _by_domain(read_passages(spec.source, "calibration"))
    streams = [
        _Chunks(passages, tokenizer, start, spec.sequence_length, np.random.default_rng([seed, index]))
        for index, passages in enumerate(by_domain.values())
    ]
    turns = _take_turns([zip(itertools.repeat(name), one) for name, one in zip(by_domain, streams, strict=True)])
    found = [turn for _, turn in zip(progress(iter(range(spec.num_sequences))), turns, strict=False)]
    domains, rows = tuple(name for name, _ in found), [row for _, row in found]
    if len(rows) < spec.num_sequences:
        total = sum(stream.num_tokens for stream in streams)
        raise InputError(
            f"calibration text {spec.source!r} holds {total:,} tokens, which make {len(rows)} sequences of "
            f"{spec.sequence_length}; {spec.num_sequences} were asked for"
        )
    return torch.tensor(np.stack(rows), dtype=torch.int64), domains


def evaluation(
    source: str, tokenizer: Tokenizer, *, max_tokens: int | None = None, max_document: int | None = None
) -> list[Document]:
    """Evaluation documents in the source's order, with the special tokens that the tokenizer adds.

    `max_tokens` keeps whole documents, domains in turn, until so many tokens are reached; `max_document` cuts each
    document's tail. A document of fewer than two tokens has nothing to score and is left out.
    """
    passages = read_passages(source, "evaluation")
    documents: list[Document] = []
    total = 0
    for passage in _interleave(_by_domain(passages)) if max_tokens else passages:
        ids = torch.tensor(_encode(passage, tokenizer, special=True)[:max_document], dtype=torch.int64)
        if len(ids) >= 2:
            documents.append(Document(passage.domain, ids))
            total += len(ids)
        if max_tokens and total >= max_tokens:
            break
    if not documents:
        raise InputError(f"evaluation text {source!r} holds no document of two tokens or more")
    return documents


class _Chunks(Iterator[np.ndarray]):
    """Sequences of `length` tokens, `start` among them, from passages in a random order, none tokenised in vain."""

    def __init__(
        self,
        passages: Sequence[Passage],
        tokenizer: Tokenizer,
        start: list[int],
        length: int,
        random: np.random.Generator,
    ) -> None:
        self._passages = iter([passages[index] for index in random.permutation(len(passages))])
        self._tokenizer, self._start, self._random = tokenizer, start, random
        self._length = length - len(start)  # of a sequence's own tokens
        self._left: list[int] = []
        self._ready: list[np.ndarray] = []
        self.num_tokens = 0

    def __next__(self) -> np.ndarray:
        while not self._ready:
            passage = next(self._passages)  # its StopIteration ends this iterator too
            ids = _encode(passage, self._tokenizer, special=False)
            if self._start and ids[: len(self._start)] == self._start:
                ids = ids[len(self._start) :]  # written out in the text, or ids that have it already: never twice
            if passage.ids is None and self._tokenizer.eos_token_id is not None:
                ids.append(self._tokenizer.eos_token_id)
            self.num_tokens += len(ids)
            self._cut(self._left + ids)
        return self._ready.pop()

    def _cut(self, ids: list[int]) -> None:
        whole = len(ids) // self._length * self._length
        chunks = np.array(ids[:whole], dtype=np.int64).reshape(-1, self._length)
        chunks = np.concatenate([np.tile(np.array(self._start, dtype=np.int64), (len(chunks), 1)), chunks], axis=1)
        self._ready = [chunks[index] for index in self._random.permutation(len(chunks))]
        self._left = ids[whole:]


def _encode(passage: Passage, tokenizer: Tokenizer, *, special: bool) -> list[int]:
    if passage.ids is not None:
        return list(passage.ids)
    return tokenizer.encode(passage.text, add_special_tokens=special)


def _by_domain(passages: Sequence[Passage]) -> dict[str, list[Passage]]:
    domains: dict[str, list[Passage]] = {}
    for passage in passages:
        domains.setdefault(passage.domain, []).append(passage)
    return domains


def _interleave(domains: dict[str, list[Passage]]) -> Iterator[Passage]:
    return _take_turns([iter(passages) for passages in domains.values()])


def _take_turns(streams: Sequence[Iterator[T]]) -> Iterator[T]:
    live = list(streams)
    while live:
        for stream in list(live):
            try:
                yield next(stream)
            except StopIteration:
                live.remove(stream)
