"""Split the documents, ship the held-out ones, train the tokenizer, pack the training tokens.

    python -m benchmarks.prepare_text --cache build/text --out models/tinymoe --work build/tinymoe

Documents are compared by the SHA-256 of their text without white space; a second copy is dropped.
In each shipped domain the documents of 1,000 to 16,000 characters are put in the order of that hash:
the first ones up to a quota are evaluation, the next ones calibration, everything else is training.
The split therefore depends on the text alone. Tokenizer and model see training documents only.
"""

import argparse
import hashlib
import json
import logging
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from benchmarks.text_sources import Document, fetch_packages, package_versions, read_documents

SHIPPED_DOMAINS = ("wiki", "web", "python", "docs", "scripture")
EVALUATION_CHARACTERS, CALIBRATION_CHARACTERS = 110_000, 95_000  # a domain
SHIPPED_LENGTHS = range(1_000, 16_001)
UNFIT = {"c4.utf8:183"}  # a list of names of an adult site: neither shipped nor trained on
VOCABULARY = 3_072
TOKENIZER_CHARACTERS = 2_000_000  # a domain
PHRASE_WORDS = 10
END_OF_TEXT = "<|endoftext|>"
SPLITS = ("evaluation", "calibration", "train")
log = logging.getLogger("prepare_text")


def fingerprint(text: str) -> str:
    """SHA-256 of the text without white space."""
    return hashlib.sha256("".join(text.split()).encode()).hexdigest()


def drop_copies(documents: Iterable[Document]) -> dict[str, Document]:
    """Hash -> document; the first of several copies stays."""
    unique: dict[str, Document] = {}
    for document in documents:
        unique.setdefault(fingerprint(document.text), document)
    return unique


def split_documents(unique: dict[str, Document]) -> dict[str, list[Document]]:
    """Evaluation, calibration and training documents, disjoint by construction."""
    splits: dict[str, list[Document]] = {name: [] for name in SPLITS}
    filled: dict[tuple[str, str], int] = defaultdict(int)
    quotas = (("evaluation", EVALUATION_CHARACTERS), ("calibration", CALIBRATION_CHARACTERS))
    for _, document in sorted(unique.items()):
        target, length = "train", len(document.text)
        if document.domain in SHIPPED_DOMAINS and length in SHIPPED_LENGTHS:
            open_splits = (name for name, quota in quotas if filled[name, document.domain] < quota)
            target = next(open_splits, "train")
        filled[target, document.domain] += length
        if document.source not in UNFIT:
            splits[target].append(document)
    return splits


def write_jsonl(path: Path, documents: Iterable[Document]) -> None:
    """One JSON object a line, sorted by domain; the order within a domain stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for document in sorted(documents, key=lambda d: SHIPPED_DOMAINS.index(d.domain)):
            record = {"domain": document.domain, "source": document.source, "text": document.text}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def by_domain(documents: Iterable[Document]) -> dict[str, list[str]]:
    """Domain -> texts."""
    groups: dict[str, list[str]] = defaultdict(list)
    for document in documents:
        groups[document.domain].append(document.text)
    return dict(groups)


def train_tokenizer(groups: dict[str, list[str]]) -> Tokenizer:
    """Byte-level BPE; every domain lends at most the same number of characters."""
    sample: list[str] = []
    for texts in groups.values():
        budget = TOKENIZER_CHARACTERS
        for text in texts:
            sample.append(text[: max(budget, 0)])
            budget -= len(text)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample, trainer)
    return tokenizer


def pack_tokens(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """All documents in a row, an end-of-text id before each."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    rows = [np.array([end, *encoding.ids], dtype=np.uint16) for encoding in tokenizer.encode_batch(texts)]
    return np.concatenate(rows)


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """tokenizer.json and what transformers wants beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def describe(documents: list[Document], counts: dict[str, int]) -> dict[str, dict[str, int]]:
    """Domain -> documents, UTF-8 bytes and tokens, for the README."""
    return {
        domain: {"documents": len(texts), "bytes": sum(len(t.encode()) for t in texts), "tokens": counts[domain]}
        for domain, texts in by_domain(documents).items()
    }


def phrases(text: str) -> set[int]:
    """Hashes of the text's sequences of ten words."""
    words = text.split()
    return {hash(tuple(words[i : i + PHRASE_WORDS])) for i in range(len(words) - PHRASE_WORDS + 1)}


def shared_phrases(splits: dict[str, list[Document]]) -> dict[str, float]:
    """Domain -> share of the evaluation text's phrases that training documents hold too."""
    seen: set[int] = set()
    for document in splits["train"]:
        seen |= phrases(document.text)
    shares = {}
    for domain, texts in sorted(by_domain(splits["evaluation"]).items()):
        held_out = set().union(*map(phrases, texts))
        shares[domain] = len(held_out & seen) / len(held_out)
    return shares


def prepare(cache: Path, out: Path, work: Path) -> None:
    """Write the shipped text and tokenizer to `out`, packed tokens and a summary to `work`."""
    fetch_packages(cache)
    splits = split_documents(drop_copies(read_documents(cache)))
    for name in ("evaluation", "calibration"):
        write_jsonl(out / "text" / f"{name}.jsonl", splits[name])
    tokenizer = train_tokenizer(by_domain(splits["train"]))
    save_tokenizer(tokenizer, out)
    work.mkdir(parents=True, exist_ok=True)
    counts: dict[str, dict[str, int]] = {}
    for split, documents in splits.items():
        packed = {domain: pack_tokens(tokenizer, texts) for domain, texts in by_domain(documents).items()}
        np.savez(work / f"{split}.npz", allow_pickle=False, **packed)
        counts[split] = {domain: len(ids) for domain, ids in packed.items()}
    summary = {
        "sources": package_versions(cache),
        "splits": {split: describe(documents, counts[split]) for split, documents in splits.items()},
        "shared_phrases": shared_phrases(splits),
    }
    (work / "text_summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    log.info("%s", json.dumps(counts, indent=2))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Prepare tinymoe's text and tokenizer.")
    parser.add_argument("--cache", type=Path, default=Path("build/text"))
    parser.add_argument("--out", type=Path, default=Path("models/tinymoe"))
    parser.add_argument("--work", type=Path, default=Path("build/tinymoe"))
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    prepare(arguments.cache, arguments.out, arguments.work)


if __name__ == "__main__":
    main()
