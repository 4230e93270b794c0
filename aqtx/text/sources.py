"""Where text comes from: the shipped text, a file, a folder, or a data set by name. Everything ends as `Passage`s.

A source is written in one word, as recipes do:

    builtin             the text shipped with tinymoe (its calibration and evaluation halves are disjoint)
    builtin:wiki        one domain of it: wiki, web, python, docs or scripture
    notes.txt           one passage, whatever the ending, but those of tables and documents, which are refused
    rows.jsonl          a passage per line, {"text": ..., "domain": ...}; `.ndjson` too, `.json` also as one list
    corpus/             every file of these kinds and .md below it; a sub-folder's name is the domain
    (each may be compressed: `.gz`)
    wikitext2           also c4, ptb, gsm8k: through the `datasets` library, from the hub or its cache
    wikitext2:folder    the same data set from a local copy in the hub's own layout
"""

import gzip
import itertools
import json
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from aqtx.errors import InputError, nearest, printable

UNNAMED = "text"  # the domain of text that names none
BUILTIN_DOMAINS = ("wiki", "web", "python", "docs", "scripture")
BUILTIN = Path(__file__).resolve().parents[1] / "models" / "tinymoe" / "text"
_MOST_TEXT = 2_000_000_000  # characters of one file: what a compressed one may unfold to
_MOST_FILES = 100_000  # below one folder
_LINES = (".jsonl", ".ndjson", ".json")
_NO_TEXT = (
    *(".csv", ".tsv", ".parquet", ".arrow", ".feather", ".xlsx", ".xml", ".html", ".htm", ".yaml", ".yml", ".sqlite"),
    *(".pdf", ".doc", ".docx", ".epub", ".zip", ".tar", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".safetensors", ".npy"),
)
SUFFIXES = (".txt", ".md", *_LINES)  # each also with .gz behind it


@dataclass(frozen=True)
class Passage:
    """A text with the domain it belongs to, or, from self-sampling, the token ids themselves."""

    domain: str
    text: str
    ids: tuple[int, ...] | None = None


@dataclass(frozen=True)
class HubDataset:
    """How one named data set is loaded and turned into passages."""

    path: str
    config: str | None
    field: str
    joined: str | None = None  # rows are lines of one text, joined by this
    split: str = "train"
    evaluation_split: str = "test"
    data_files: dict[str, str] | None = None
    revision: str | None = None

    def rows_to_texts(self, rows: Any) -> Iterator[str]:
        """One text per row, or a single one where the rows are lines of it."""
        if self.joined is not None:
            yield self.joined.join(rows[self.field])
            return
        for row in rows:
            yield " ".join(str(row[name]) for name in self.field.split("+"))


# The line-by-line data sets are joined as the GPTQ paper does; c4 is one shard, as everywhere in the field.
# ptb was published as a loading script, which `datasets` no longer runs: its parquet conversion is read instead.
DATASETS = {
    "wikitext2": HubDataset("Salesforce/wikitext", "wikitext-2-raw-v1", "text", joined="\n\n"),
    "c4": HubDataset(
        "allenai/c4",
        None,
        "text",
        evaluation_split="validation",
        data_files={
            "train": "en/c4-train.00000-of-01024.json.gz",
            "validation": "en/c4-validation.00000-of-00008.json.gz",
        },
    ),
    "ptb": HubDataset(
        "ptb-text-only/ptb_text_only", "penn_treebank", "sentence", joined=" ", revision="refs/convert/parquet"
    ),
    "gsm8k": HubDataset("openai/gsm8k", "main", "question+answer"),
}


def read_passages(source: str, part: str) -> list[Passage]:
    """All passages of a source. `part` is "calibration" or "evaluation": which half or split is read."""
    check_source(source)
    name, _, local = source.partition(":")
    if name in DATASETS:
        return list(_from_hub(name, Path(local) if local else None, part))
    path = Path(source)
    if name == "builtin":
        return [passage for passage in _builtin(part) if local in ("", passage.domain)]
    return _from_folder(path) if path.is_dir() else list(_from_file(path, UNNAMED))


def check_source(source: str) -> None:
    """InputError unless a source is the name of something, or there."""
    known = ["builtin", *(f"builtin:{domain}" for domain in BUILTIN_DOMAINS), *DATASETS]
    if not source.strip():
        raise InputError(f"text source {source!r} names nothing; give a file, a folder or one of {', '.join(known)}")
    if source in known or source.partition(":")[0] in DATASETS:
        return
    there, readable = _look_up(Path(source))
    if there and not readable:
        raise InputError(f"text source {source!r} is a pipe or a device, and no file of text")
    if source.startswith("builtin:") or not there:
        raise InputError(
            f"text source {source!r} is neither a file, a folder nor one of {', '.join(known)}{nearest(source, known)}"
        )


def _look_up(path: Path) -> tuple[bool, bool]:
    """Whether something is there, and whether it is a file or a folder."""
    try:
        return path.exists(), path.is_file() or path.is_dir()
    except (OSError, ValueError):  # no name that a file system takes
        return False, False


def _builtin(part: str) -> list[Passage]:
    for suffix in (".jsonl", ".jsonl.gz"):
        path = BUILTIN / (part + suffix)
        if path.is_file():
            return list(_from_file(path, UNNAMED))
    raise InputError(f"the shipped {part} text is missing from {BUILTIN}")


def _from_folder(folder: Path) -> list[Passage]:
    found = list(itertools.islice(folder.rglob("*"), _MOST_FILES + 1))
    if len(found) > _MOST_FILES:  # `/`, a home folder
        raise InputError(f"the folder {folder} holds more than {_MOST_FILES:,} files; name the one that has the text")
    files = sorted(path for path in found if path.is_file())
    paths = [path for path in files if _kind(path) in SUFFIXES]
    if not paths:
        raise InputError(f"the folder {folder} holds no text file ({', '.join(SUFFIXES)})")
    if passed := sorted(path.name for path in files if _kind(path) in _NO_TEXT):
        warnings.warn(f"{folder}: {len(passed)} files are not read as text, first {passed[0]}", stacklevel=2)
    passages: list[Passage] = []
    for path in paths:
        parents = path.relative_to(folder).parts[:-1]
        passages += _from_file(path, parents[0] if parents else UNNAMED)
    return passages


def _from_file(path: Path, domain: str) -> Iterator[Passage]:
    if not path.is_file():  # a named pipe would be waited for, a device never ends
        raise InputError(f"{path} is no file of text")
    kind = _kind(path)
    if kind in _NO_TEXT:
        raise InputError(
            f'{path}: {kind} is not read as text; write a line {{"text": ...}} for each passage into a .jsonl file'
        )
    try:
        opener = gzip.open if path.suffix.lower() == ".gz" else open
        with opener(path, "rt", encoding="utf-8") as stream:
            if kind == ".json" and _begins_list(stream):
                yield from _from_list(stream, path, domain)
                return
            if kind not in _LINES:
                text = stream.read(_MOST_TEXT + 1)
                _refuse_size(path, len(text))
                yield Passage(domain, text)
                return
            size = 0
            for number, line in enumerate(_lines(stream), start=1):
                size += len(line)
                _refuse_size(path, size)
                if line.strip():
                    yield _from_line(line, f"{path}, line {number}", domain)
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path} is not a whole gzip file: {error}") from error


def _kind(path: Path) -> str:
    """The ending that tells what a file holds, in small letters and without `.gz`."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _begins_list(stream: IO[str]) -> bool:
    """Whether the first character is that of a JSON list; the stream stays at its beginning."""
    first = stream.read(4096).lstrip()
    stream.seek(0)
    return first.startswith("[")


def _from_list(stream: IO[str], path: Path, domain: str) -> Iterator[Passage]:
    """Passages of one JSON list: objects as a line of .jsonl has them, or texts."""
    text = stream.read(_MOST_TEXT + 1)
    _refuse_size(path, len(text))
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {getattr(error, 'msg', error)}") from error
    for number, row in enumerate(rows, start=1):
        yield _from_row({"text": row} if isinstance(row, str) else row, f"{path}, entry {number}", domain)


def _lines(stream: IO[str]) -> Iterator[str]:
    """Lines, none of them read further than the limit."""
    return iter(lambda: stream.readline(_MOST_TEXT + 1), "")


def _refuse_size(path: Path, size: int) -> None:
    if size > _MOST_TEXT:
        raise InputError(f"{path} holds more than {_MOST_TEXT:,} characters of text; split it or take a part of it")


def _from_line(line: str, place: str, domain: str) -> Passage:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place} is not JSON: {getattr(error, 'msg', error)}") from error
    return _from_row(row, place, domain)


def _from_row(row: Any, place: str, domain: str) -> Passage:
    if not isinstance(row, dict):
        raise InputError(f'{place} has neither a "text" string nor an "ids" list')
    named = printable(str(row.get("domain", domain)))
    if isinstance(row.get("ids"), list):
        wrong = [token for token in row["ids"] if type(token) is not int or not 0 <= token < 2**31]
        if wrong:
            raise InputError(f"{place}: ids must be whole numbers from 0 up, not {wrong[0]!r:.80}")
        return Passage(named, "", tuple(row["ids"]))
    if not isinstance(row.get("text"), str):
        raise InputError(f'{place} has neither a "text" string nor an "ids" list')
    if any("\ud800" <= letter <= "\udfff" for letter in row["text"]):
        raise InputError(f"{place}: the text holds half a surrogate pair, which is no character")
    return Passage(named, row["text"])


def _from_hub(name: str, local: Path | None, part: str) -> Iterator[Passage]:
    import datasets  # heavy, and needed only here

    spec = DATASETS[name]
    split = spec.split if part == "calibration" else spec.evaluation_split
    if local is not None and not local.is_dir():
        raise InputError(f"the local copy of {name}, {local}, is not a folder")
    try:
        rows = datasets.load_dataset(
            str(local) if local else spec.path,
            spec.config,
            split=split,
            data_files=spec.data_files,
            revision=None if local else spec.revision,
        )
        texts = list(spec.rows_to_texts(rows))
    except Exception as error:  # whatever the hub client raises is the user's answer: no network, no such split
        raise InputError(
            f"data set {name} ({spec.path}, split {split}) cannot be loaded: {type(error).__name__}: {error}; "
            f"offline, give a local copy as '{name}:FOLDER'"
        ) from error
    for text in texts:
        yield Passage(name, text)
