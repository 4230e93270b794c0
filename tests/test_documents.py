"""Documents hold together: their length, their sentences, their links, and commands that stand in running text."""

import ast
import re
import shlex
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

from aqtx import cli
from aqtx.runs.recipe import load_recipe
from tests.documents import DOCUMENTS, ROOT, anchors_of, inline_commands_of, links_of, sentences_of

COMMANDS = sorted({line for name in DOCUMENTS for line in inline_commands_of((ROOT / name).read_text())})


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 160
    assert max(map(len, lines)) <= 160  # tables and code; prose is wrapped at 120


def test_sentences_are_counted_as_a_reader_would():
    text = "# A title\n\nOne two `a b` [three four](x.md). Six!\n\n| a | b |\n\n- seven eight\n- nine\n\n"
    text += "```sh\nno no\n```\n"
    assert [len(sentence.split()) for sentence in sentences_of(text)] == [5, 1, 2, 1]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_sentences_are_short_on_average(name):
    counts = [len(sentence.split()) for sentence in sentences_of((ROOT / name).read_text())]
    assert len(counts) > 5
    assert sum(counts) / len(counts) <= 25


def test_every_link_leads_somewhere():
    broken = []
    for name in (*DOCUMENTS, "models/tinymoe/README.md"):
        for link in links_of((ROOT / name).read_text()):
            path, _, anchor = link.partition("#")
            target = (ROOT / name).parent / path if path else ROOT / name
            if link.startswith("https://"):
                continue
            if not target.exists() or (anchor and anchor not in anchors_of(target.read_text())):
                broken.append(f"{name}: {link}")
    assert broken == []


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("aqtx ")])
def test_commands_in_running_text_are_understood(line):
    words = shlex.split(line)[1:]
    if len(words) == 1:  # only the name of a command
        assert words[0] in [command.name for command in cli.COMMANDS]
        return
    arguments = cli.parse_arguments(words)
    if "recipe" in arguments and not re.search(r"\b[A-Z]+\b", line):  # words in capitals stand for the reader's own
        load_recipe(arguments.recipe, arguments.overrides)


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("python ")])
def test_benchmarks_in_running_text_exist_with_their_options(line):
    words = shlex.split(line)
    module = words[2].replace(".", "/") + ".py" if words[1] == "-m" else words[1]
    source = Path(ROOT / module).read_text()
    assert [word for word in words if word.startswith("--") and f'"{word}"' not in source] == []


def test_what_benchmarks_import_of_aqtx_exists():
    lost = []
    for file in sorted((ROOT / "benchmarks").glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "aqtx":
                module = import_module(node.module)
                lost += [
                    f"{file.name}: {node.module}.{alias.name}" for alias in node.names if not has(module, alias.name)
                ]
    assert lost == []


def has(module: ModuleType, name: str) -> bool:
    """Whether a module holds a name, or a module of that name."""
    return hasattr(module, name) or find_spec(f"{module.__name__}.{name}") is not None
