"""Real text of several kinds, obtained by package name and cut into documents.

| domain     | where it comes from                                          | a document is      |
| ---------- | ------------------------------------------------------------ | ------------------ |
| `wiki`     | wheel exllamav3==1.6.5, `wiki.utf8` (English Wikipedia)      | an article         |
| `web`      | same wheel, `c4.utf8` (C4)                                   | a page             |
| `python`   | the standard library of the Python that runs this            | a file             |
| `docs`     | Debian's python3.11-doc, reStructuredText sources            | a file             |
| `scripture`| Debian's bible-kjv-text, read with bible-kjv                 | a chapter          |
| `snippets` | same wheel, `code.utf8` (mixed licences, training only)      | 8,000 characters   |
| `articles` | same wheel, `technical.utf8` (mixed licences, training only) | 8,000 characters   |
| `stories`  | same wheel, `tiny.utf8` (TinyStories, training only)         | a story            |

Packages that lie in the cache folder already are not fetched again. Nothing is installed.
"""

import re
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

WHEEL = "exllamav3==1.6.5"
DEBIAN_PACKAGES = ("bible-kjv", "bible-kjv-text", "python3.11-doc")
WHEEL_FOLDER = "exllamav3/conversion/standard_cal_data"
SKIPPED_LIBRARY_PARTS = {"site-packages", "test", "tests", "lib2to3", "idlelib", "__pycache__", "encodings"}
CHUNK_CHARACTERS = 8_000


@dataclass(frozen=True)
class Document:
    """One document of one domain; `source` says where it can be found."""

    domain: str
    text: str
    source: str


def fetch_packages(cache: Path) -> None:
    """Download and unpack the wheel and the Debian packages that `cache` lacks."""
    cache.mkdir(parents=True, exist_ok=True)
    if not list(cache.glob("exllamav3-*.whl")):
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", WHEEL, "-d", str(cache)]
        subprocess.run(command, check=True)
    for name in DEBIAN_PACKAGES:
        if not list(cache.glob(f"{name}_*.deb")):
            subprocess.run(["apt-get", "download", name], check=True, cwd=cache)
    for wheel in cache.glob("exllamav3-*.whl"):
        zipfile.ZipFile(wheel).extractall(cache / "unpacked")
    for package in sorted(cache.glob("*.deb")):
        subprocess.run(["dpkg-deb", "-x", str(package), str(cache / "unpacked")], check=True)


def package_versions(cache: Path) -> list[str]:
    """The files that the text was read from, and the version of Python's library."""
    names = [path.name for path in sorted(cache.iterdir()) if path.suffix in (".whl", ".deb")]
    return [*names, f"Python {sys.version.split()[0]} standard library"]


def read_documents(cache: Path) -> Iterator[Document]:
    """Every document of every domain, in a fixed order."""
    root = cache / "unpacked"
    yield from read_wiki(root / WHEEL_FOLDER / "wiki.utf8")
    yield from read_lines("web", root / WHEEL_FOLDER / "c4.utf8")
    yield from read_library(Path(sysconfig.get_path("stdlib")))
    yield from read_manual(root / "usr/share/doc/python3.11/html/_sources")
    yield from read_scripture(root)
    yield from read_chunks("snippets", root / WHEEL_FOLDER / "code.utf8")
    yield from read_chunks("articles", root / WHEEL_FOLDER / "technical.utf8")
    yield from read_stories(root / WHEEL_FOLDER / "tiny.utf8")


def read_wiki(path: Path) -> Iterator[Document]:
    """Articles between `<doc url=...>` and `</doc>`; the stubs without a body are dropped."""
    pattern = re.compile(r'<doc id="\d+" url="([^"]+)"[^>]*>\n(.*?)</doc>', re.DOTALL)
    for url, body in pattern.findall(path.read_text("utf-8")):
        text = re.sub(r"\n{3,}", "\n\n", body).strip()
        if len(text) >= 200:
            yield Document("wiki", text, url)


def read_lines(domain: str, path: Path) -> Iterator[Document]:
    """One document a line."""
    for number, line in enumerate(path.read_text("utf-8").split("\n"), start=1):
        if len(line) >= 200:
            yield Document(domain, line.strip(), f"{path.name}:{number}")


def read_library(root: Path) -> Iterator[Document]:
    """Python's own modules, without its tests."""
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not SKIPPED_LIBRARY_PARTS.intersection(name.parts):
            text = path.read_text("utf-8", errors="replace").strip()
            if len(text) >= 200:
                yield Document("python", text, f"Lib/{name.as_posix()}")


def read_manual(root: Path) -> Iterator[Document]:
    """Python's manual in its source form, without the list of changes."""
    for path in sorted(root.rglob("*.rst.txt")):
        name = path.relative_to(root)
        text = path.read_text("utf-8").strip()
        if "changelog" not in name.name and len(text) >= 200:
            yield Document("docs", text, f"Doc/{name.as_posix()}")


def read_scripture(root: Path) -> Iterator[Document]:
    """The King James Bible, one chapter a document, decoded by Debian's own reader."""
    command = [str(root / "usr/bin/bible"), "-p", str(root / "usr/lib"), "-f", "gen1:1-rev22:21"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    chapters: dict[str, list[str]] = {}
    for line in lines:
        match = re.match(r"(\d?[A-Za-z]+\d+):(\d+)\s+(.*)", line)
        if match:
            chapters.setdefault(match[1], []).append(f"{match[2]} {match[3].strip()}")
    for name, verses in chapters.items():
        yield Document("scripture", "\n".join(verses), f"KJV {name}")


def read_chunks(domain: str, path: Path) -> Iterator[Document]:
    """A file without marks between its documents, in pieces of one size."""
    text = path.read_text("utf-8")
    for start in range(0, len(text), CHUNK_CHARACTERS):
        yield Document(domain, text[start : start + CHUNK_CHARACTERS], f"{path.name}@{start}")


def read_stories(path: Path) -> Iterator[Document]:
    """Stories between end-of-text marks."""
    for number, story in enumerate(path.read_text("utf-8").split("<|endoftext|>"), start=1):
        if len(story.strip()) >= 200:
            yield Document("stories", story.strip(), f"{path.name}#{number}")
