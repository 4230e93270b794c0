"""The table of model families and what works for each, from the tables that the code itself goes by."""

from aqtx.commands.tables import format_table

HEADERS = ("model_type", "graph", "cache", "streamed", "packed sources", "rotations", "exports")
ROTATIONS = ("residual", "heads", "down")
NOTE = (
    "graph: ours (`models/`), or traced from transformers' module. cache: generates with ours or with\n"
    "transformers' own. streamed: weights are read one matrix at a time. rotations: of the residual stream (R1), of\n"
    "heads (R2), before down projections; others are refused in a sentence."
)


def family_rows() -> list[list[str]]:
    """A row per family in the order of `HEADERS`, own ones first."""
    from aqtx.checkpoint.packed.open import packings
    from aqtx.models import MODEL_TYPES, UNROTATED

    rows = []
    for kind in MODEL_TYPES:
        rotations = [rotation for rotation in ROTATIONS if rotation not in UNROTATED.get(kind, ())]
        rows.append(
            [kind, "ours", "yes", "yes", ", ".join(packings(kind)), ", ".join(rotations), ", ".join(_exports(kind))]
        )
    packed = ", ".join(packings(None))
    rows.append(["any other", "traced", "transformers'", "yes", packed, "where proven", ", ".join(_exports(None))])
    return rows


def _exports(kind: str | None) -> list[str]:
    """The forms of export that hold a family; None stands for a traced one."""
    from aqtx.checkpoint.exports.gguf_families import FAMILIES
    from aqtx.checkpoint.exports.table import TARGETS
    from aqtx.models.on_disk import ALWAYS_FUSED

    without = {"compressed-tensors"} if kind in ALWAYS_FUSED else set()
    without |= set() if kind in FAMILIES else {"gguf"}
    return [name for name in TARGETS if name not in without]


def text_table() -> str:
    """For the terminal."""
    return f"{format_table(list(HEADERS), family_rows())}\n\n{NOTE}"


def markdown_table() -> str:
    """For `models/README.md`."""
    rows = [[f"`{row[0]}`" if row[1] == "ours" else row[0], *row[1:]] for row in family_rows()]
    lines = [list(HEADERS), ["---"] * len(HEADERS), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
