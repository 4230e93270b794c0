"""`aqtx ls`: what there is to choose from."""

import argparse
import dataclasses
import inspect
import itertools
import textwrap
import typing

from aqtx.commands import Command
from aqtx.commands.tables import format_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The one word that says which list."""
    parser.add_argument("what", choices=sorted(_LISTS), help="which list")


def run(arguments: argparse.Namespace) -> int:
    """Print the list."""
    print(_LISTS[arguments.what]())
    return 0


def list_passes() -> str:
    """Every pass with its fields: name, type, default and what its docstring says of it."""
    from aqtx.runs.recipe import load_passes

    blocks = []
    for name, cls in sorted(load_passes().items()):
        summary = (inspect.getdoc(cls) or "").split("\n\n")[0].replace("\n", " ")
        told = _field_texts(cls)
        lines = [name, *_wrap(summary, 2)]
        for field in dataclasses.fields(cls):
            lines += [f"    {field.name}: {_default(field)}", *_wrap(told.get(field.name, ""), 8)]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _field_texts(cls: type) -> dict[str, str]:
    """What the `Fields:` sections of a class and its parents say, by field; one entry may stand for several names."""
    told: dict[str, str] = {}
    for parent in reversed(cls.__mro__):
        _, _, section = (inspect.getdoc(parent) or "").partition("Fields:\n")
        names: list[str] = []
        for line in textwrap.dedent(section.split("\n\n")[0]).splitlines():
            head, colon, text = line.partition(": ")
            if colon and not line.startswith(" "):
                names = head.split(", ")
                told.update(dict.fromkeys(names, text))
            else:
                told.update({name: f"{told[name]} {line.strip()}" for name in names})
    return told


def _wrap(text: str, indent: int) -> list[str]:
    return textwrap.wrap(text, 110, initial_indent=" " * indent, subsequent_indent=" " * indent)


def _default(field: "dataclasses.Field[object]") -> str:
    from aqtx.schema import describe, plain

    if typing.get_origin(field.type) is typing.Annotated:
        return f"{describe(field.type)} = {plain(field.default)!r}"
    kind = field.type if isinstance(field.type, str) else inspect.formatannotation(field.type).replace("typing.", "")
    if field.default is not dataclasses.MISSING:
        return f"{kind} = {plain(field.default)!r}"
    if field.default_factory is not dataclasses.MISSING:
        return f"{kind} = {plain(field.default_factory())!r}"
    return f"{kind} (required)"


def list_recipes() -> str:
    """Every shipped recipe with the comment at its head."""
    from aqtx.runs.recipe import shipped_recipes

    blocks = []
    for name, path in shipped_recipes().items():
        lines = path.read_text(encoding="utf-8").splitlines()
        head = [line.lstrip("# ") for line in itertools.takewhile(lambda line: line.startswith("#"), lines)]
        blocks.append("\n".join([name, *(f"  {line}" for line in head)]))
    return "\n\n".join(blocks)


def list_formats() -> str:
    """The format table; each name takes the suffixes told below it."""
    from aqtx.formats.table import describe

    rows = describe()
    table = format_table(list(rows[0]), [list(row.values()) for row in rows])
    return (
        f"{table}\n\nbits are per weight of a 2048 x 2048 matrix, scales included. A name may end in a group, in _row "
        "for a whole row,\n_asym for zero points and @RULE for the scale rule: int4_g64_asym, int8_row, mxfp4@even.\n"
        "Without one, inputs too are rounded by the rule above; mxfp8@rceil and mxfp4@even lose less there."
    )


def list_models() -> str:
    """The shipped checkpoints, then the families by their model_type in config.json and what works for each."""
    from aqtx.checkpoint.locate import shipped
    from aqtx.commands.families import text_table

    return f"shipped: {', '.join(shipped())}\n\n{text_table()}"


def list_methods() -> str:
    """Every method of `assign_plan` with what it needs, and the keys that it alone or few others read."""
    from aqtx.planning.method import METHODS
    from aqtx.planning.settings import Settings

    blocks = []
    for name, row in sorted(METHODS.items()):
        wanted = [*row.needs, *(["calibration text"] if row.needs_text else [])]
        size = {"required": "a budget", "optional": "a budget or none", "own": "no budget"}[row.budget]
        keys = [key for key in Settings.__dataclass_fields__ if key in row.options]
        lines = [
            name,
            *_wrap(f"{row.summary}.", 2),
            f"    takes {size}{'; needs ' if wanted else ''}{', '.join(wanted)}",
        ]
        blocks.append("\n".join(lines + (_wrap(f"keys of its own: {', '.join(keys)}", 4) if keys else [])))
    return "\n\n".join(blocks)


_LISTS = {
    "formats": list_formats,
    "methods": list_methods,
    "models": list_models,
    "passes": list_passes,
    "recipes": list_recipes,
}

COMMAND = Command(
    name="ls",
    summary="list passes, methods, formats, models or recipes",
    example="aqtx ls formats",
    add_arguments=add_arguments,
    run=run,
)
