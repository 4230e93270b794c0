"""What all passes have in common: a stage, a sentence for each key; and nobody asks for one by its class."""

import ast
import dataclasses
from pathlib import Path

import pytest

from aqtx.commands.ls import _field_texts
from aqtx.registry import Pass, annotator
from aqtx.runs.recipe import load_passes

ROOT = Path(__file__).parents[1]
PASSES = load_passes()
OURS = {name: cls for name, cls in PASSES.items() if cls.__module__.startswith("aqtx.passes.")}
COMPOSING = {"runs/arms.py"}  # its job is to build a run from passes: `aqtx eval --plan`


@pytest.mark.parametrize("name", sorted(OURS))
def test_every_key_has_a_sentence(name: str) -> None:
    told = _field_texts(OURS[name])
    fields = [field.name for field in dataclasses.fields(OURS[name])]
    assert [field for field in fields if len(told.get(field, "").split()) < 2] == []
    assert sorted(set(told) - set(fields)) == []  # nor does a sentence stand for a key that there is not


def test_a_key_without_a_sentence_is_found() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Silent(Pass):
        """A pass.

        Fields:
            told: what it is for.
        """

        told: int = 0
        blank: int = 0

    assert _field_texts(Silent) == {"told": "what it is for."}


def test_every_pass_has_a_stage() -> None:
    stages = {name: cls.stage for name, cls in OURS.items()}
    assert {name for name, stage in stages.items() if stage == "other"} == set()
    assert {name for name, stage in stages.items() if stage == "round"} == {"gptq", "quantize"}
    assert all((cls.stage == "annotate") == bool(cls.annotates) for cls in OURS.values())


def test_the_pass_that_makes_an_annotation_is_found() -> None:
    assert annotator("alpha") is OURS["annotate_alpha"]
    assert annotator("why") is None


def test_the_engine_names_no_pass() -> None:
    """It asks for a stage, or for what a pass annotates, and so serves passes that are not there yet."""
    classes = {cls.__name__ for cls in OURS.values()}
    files = [file for room in ("runs", "study", "planning") for file in (ROOT / "aqtx" / room).rglob("*.py")]
    found = {
        f"{file.parent.name}/{file.name}": words
        for file in files
        if (words := [word for word in classes if word in _names(file.read_text())])
    }
    assert len(files) > 20
    assert set(found) <= COMPOSING


def _names(source: str) -> set[str]:
    """Names that a source uses and imports; comments and docstrings may say what they want."""
    tree = ast.parse(source)
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return names | {
        alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom | ast.Import) for alias in node.names
    }
