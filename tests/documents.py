"""The documents that readers start from, and how to take their prose, links and inline commands out of them."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = (
    "README.md",
    "recipes/README.md",
    "passes/README.md",
    "models/README.md",
    "benchmarks/README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
)


def without_blocks(text: str) -> str:
    """The text without fenced code and comments."""
    return re.sub(r"^```.*?^```$|<!--.*?-->", "", text, flags=re.DOTALL | re.MULTILINE)


def sentences_of(text: str) -> list[str]:
    """Sentences of the prose: no code, tables, headings or images; inline code is one word, a link its own text."""
    kept = []
    for line in without_blocks(text).splitlines():
        if re.match(r"\s*([|#]|!\[)", line):
            line = ""
        kept.append(re.sub(r"^\s*([-*]|\d+\.) ", "\n\n", line))  # an entry of a list is a sentence of its own
    prose = re.sub(r"`[^`]+`", "code", "\n".join(kept))
    prose = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", prose)
    paragraphs = [" ".join(paragraph.split()) for paragraph in prose.split("\n\n")]
    return [part for paragraph in paragraphs for part in re.split(r"(?<=[.!?:])\s+", paragraph) if part]


def links_of(text: str) -> list[str]:
    """Targets of links and images."""
    return re.findall(r"\]\(([^)\s]+)\)", without_blocks(text))


def anchors_of(text: str) -> set[str]:
    """What `#...` may name: headings in lower case, spaces as hyphens, other signs dropped."""
    headings = re.findall(r"^#+ (.+)$", without_blocks(text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def inline_commands_of(text: str) -> list[str]:
    """Code in running text that is a command of this project's; what holds a placeholder in capitals is none."""
    codes = re.findall(r"`([^`]+)`", without_blocks(text))
    joined = [" ".join(code.split()) for code in codes]
    return [code for code in joined if re.match(r"aqtx [a-z]|python (-m )?benchmarks", code)]
