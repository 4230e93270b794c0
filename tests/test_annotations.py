"""Annotations of sites: known by name, typed, and every name in the code is one of them."""

import ast
from pathlib import Path

import pytest

import aqtx
from aqtx.program import annotations
from aqtx.program.annotations import ANNOTATIONS, check, known
from aqtx.program.site import Site
from aqtx.runs.recipe import load_passes
from tests.tiny import write_checkpoint

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return aqtx.trace(write_checkpoint(tmp_path_factory.mktemp("annotations") / "model")).sites()[0]


def test_a_misspelt_name_is_an_error_when_read_and_when_written(site: Site) -> None:
    with pytest.raises(KeyError, match="no annotation is called 'aplha', did you mean 'alpha'"):
        site.get("aplha")
    with pytest.raises(KeyError, match="declare it first"):
        site.set("nobody_knows", 1.0)
    assert site.get("alpha") is None and "aplha" not in str(site.node.meta.get("custom"))


def test_a_value_has_the_type_of_its_name(site: Site) -> None:
    for name, value in (("alpha", 3), ("alpha", "3.2"), ("format", {}), ("why", 1), ("error", [0.1])):
        with pytest.raises(TypeError, match=f"annotation '{name}' holds"):
            site.set(name, value)
    site.set("alpha", 3.25)
    site.set("alpha", None)
    assert site.get("alpha", 7.0) == 7.0


def test_a_family_knows_its_members() -> None:
    assert known("rotation_32_none") is known("rotation_128_mxfp8_e4m3")
    assert known("rotation").kind is dict and known("rotation") is not known("rotation_32_none")
    for name in ("rotation_", "rotation_32", "rotation_32_"):
        with pytest.raises(KeyError):
            known(name)


def test_a_name_is_declared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(annotations, "ANNOTATIONS", dict(ANNOTATIONS))
    assert annotations.declare("taste", float, "how it tastes") == "taste"
    assert annotations.declare("taste", float, "how it tastes") == "taste"
    check("taste", 0.5)
    with pytest.raises(ValueError, match="declared twice"):
        annotations.declare("taste", int, "how it tastes")


def names_in(source: str) -> set[str]:
    """Literal first arguments of calls of `get` and `set` on something called a site."""
    return {
        call.args[0].value
        for call in ast.walk(ast.parse(source))
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and call.func.attr in ("get", "set")
        and isinstance(call.func.value, ast.Name)
        and call.func.value.id in ("site", "s")
        and call.args
        and isinstance(call.args[0], ast.Constant)
    }


def test_all_names_in_the_code_are_declared_and_what_passes_annotate_is() -> None:
    """The report reads rows of JSON that it also calls sites; it knows no annotation."""
    files = [file for room in ("aqtx", "passes") for file in (ROOT / room).rglob("*.py") if "report" not in file.parts]
    found = {name: file.name for file in files for name in names_in(file.read_text())}
    assert len(found) >= 10
    assert {name: file for name, file in found.items() if name not in ANNOTATIONS} == {}
    made = {name for cls in load_passes().values() for name in cls.annotates}
    assert {"alpha", "error", "hessian", "fisher", "trial_loss"} <= made <= set(ANNOTATIONS)
    assert all(row.meaning for row in ANNOTATIONS.values())
