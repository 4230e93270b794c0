"""The rooms of the package: who may import whom, written down once, and held against every import there is."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "aqtx"
ROOT = PACKAGE.parent

# From the ground up. A room imports from itself and from lower floors; rooms of one floor know nothing of each other.
FLOORS = (
    ("errors", "version"),
    ("schema",),
    ("machine",),
    ("formats",),
    ("numerics",),
    ("models",),
    ("program",),
    ("registry", "checkpoint", "text", "rotation", "report"),
    ("blockwise",),
    ("evaluate", "finetune"),
    ("sensitivity",),
    ("planning",),
    ("passes",),
    ("runs",),
    ("study",),
    ("commands",),
    ("cli",),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# The package's own front door: it imports on first use, and nothing below may come through it.
ENTRANCES = ("__init__", "__main__")


def module_of(file: Path) -> str:
    """Dotted name below `aqtx`: "program.site"; a package is its folder."""
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


FILES = {module_of(file): file for file in sorted(PACKAGE.glob("**/*.py"))}
for linked in ("passes", "models"):
    FILES |= {module_of(file): file for file in sorted((PACKAGE / linked).glob("*.py"))}


def imports_of(source: str) -> set[str]:
    """Modules of the package that a source imports anywhere: at its top, in functions, for type checkers."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("aqtx.") for alias in node.names if alias.name.startswith("aqtx.")}
        elif isinstance(node, ast.ImportFrom) and node.module is not None and node.module.split(".")[0] == "aqtx":
            module = node.module.removeprefix("aqtx").removeprefix(".")
            names = [".".join(filter(None, (module, alias.name))) for alias in node.names]
            found |= {name if name in FILES else module for name in names}
    return found - {""}


def upward(imports: dict[str, set[str]]) -> list[str]:
    """A line for each import of a room that is not below the importer's."""
    return [
        f"{importer} imports {imported}"
        for importer, names in sorted(imports.items())
        for imported in sorted(names)
        for own, other in [(importer.split(".")[0], imported.split(".")[0])]
        if own not in ENTRANCES and own != other and FLOOR_OF[other] >= FLOOR_OF[own]
    ]


def circle(imports: dict[str, set[str]]) -> list[str]:
    """The modules of one circle of imports, or nothing."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return path[path.index(module) :]
        if module in done:
            return []
        for name in sorted(imports.get(module, ())):
            if found := visit(name, [*path, module]):
                return found
        done.add(module)
        return []

    return next((found for module in sorted(imports) if (found := visit(module, []))), [])


IMPORTS = {module: imports_of(file.read_text()) for module, file in FILES.items()}


def test_every_module_has_a_room() -> None:
    assert {module.split(".")[0] for module in FILES} - {*ENTRANCES, "recipes"} <= set(FLOOR_OF)
    assert len(FILES) > 150


def test_imports_run_downward() -> None:
    assert upward(IMPORTS) == []


def test_no_circle_between_files() -> None:
    assert circle(IMPORTS) == []


@pytest.mark.parametrize(
    ("planted", "complaint"),
    [
        ("def f():\n    from aqtx.planning.costs import COSTS\n", "numerics.hadamard imports planning.costs"),
        ("from aqtx.text import tokens\n", "numerics.hadamard imports text.tokens"),
        ("import aqtx.program.site\n", "numerics.hadamard imports program.site"),
    ],
)
def test_an_upward_import_is_found_wherever_it_stands(planted: str, complaint: str) -> None:
    assert upward(IMPORTS | {"numerics.hadamard": imports_of(planted)}) == [complaint]


def test_a_circle_is_found() -> None:
    assert set(circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})) == {"a", "b", "c"}


def late_imports(source: str) -> list[str]:
    """Lines that import from the package inside a function."""
    lines = source.splitlines()
    return [
        lines[inner.lineno - 1].strip()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef)
        for inner in ast.walk(node)
        if isinstance(inner, ast.ImportFrom) and (inner.module or "").startswith("aqtx")
    ]


def test_imports_inside_functions_say_why() -> None:
    """Commands import late so that `aqtx --help` is fast; elsewhere each such import tells its reason beside it."""
    late = {module: late_imports(file.read_text()) for module, file in FILES.items()}
    silent = [
        f"{module}: {line}"
        for module, lines in late.items()
        for line in lines
        if module.split(".")[0] != "commands" and "  # " not in line
    ]
    assert silent == []
