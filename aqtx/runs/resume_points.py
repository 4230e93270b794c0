"""Resume points between passes: everything that passes have done to a program, on disk."""

from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from aqtx.errors import InputError, malformed
from aqtx.machine.files import read_record, sha256, write_record, writing
from aqtx.program.codes import CODES
from aqtx.program.edits import edit_from_json
from aqtx.program.plan import Plan
from aqtx.program.program import Program

_STATE = "state.json"


def save_state(program: Program, rows: list[dict[str, Any]], folder: Path) -> None:
    """Write a program's annotations, plan, edits and changed weights; replaces the state before.

    Codes are not copied: they lie in `folder/codes` already and are told by name and checksum.
    """
    file = folder / f"state-{len(program.history)}.safetensors"
    tensors, changes = program.weights.state()
    with writing(file, sum(value.nbytes for value in tensors.values())):
        save_file({name: value.contiguous() for name, value in tensors.items()}, file)
    state = {
        "history": program.history,
        "edits": [edit.to_json() for edit in program.edits],
        "plan": None if program.plan is None else program.plan.to_json(),
        "annotations": {site.weight: site.node.meta.get("custom", {}).get("aqtx", {}) for site in program.sites()},
        "codes": program.codes.to_json(),
        "emitted": program.emitted,
        "trainable": program.trainable,
        "rows": rows,
        "weights": {"file": file.name, "sha256": sha256(file), "changes": changes},
    }
    write_record(folder / _STATE, state)
    for old in folder.glob("state-*.safetensors"):
        if old != file:
            old.unlink()


def restore_state(program: Program, folder: Path) -> list[dict[str, Any]]:
    """Bring a freshly traced program to the last resume point, if there is one; the report rows so far."""
    if not (folder / _STATE).exists():
        return []
    with malformed(f"{folder / _STATE}: resume data of another version; start again with --overwrite"):
        return _restore(program, read_record(folder / _STATE), folder)


def _restore(program: Program, state: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    file = folder / state["weights"]["file"]
    if not file.exists() or sha256(file) != state["weights"]["sha256"]:
        raise InputError(
            f"{file}: resume data is missing or damaged (its SHA-256 differs); start again with --overwrite"
        )
    program.edit(*map(edit_from_json, state["edits"]))
    program.history.extend(state["history"])
    program.plan = None if state["plan"] is None else Plan.from_json(state["plan"])
    program.emitted = state["emitted"]
    program.trainable = state["trainable"]
    program.codes.restore(state["codes"], folder / CODES)
    for site in program.sites():
        site.node.meta.setdefault("custom", {})["aqtx"] = state["annotations"][site.weight]
    with safe_open(file, "pt") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  (the reader is no mapping)
    program.weights.restore(tensors, state["weights"]["changes"])
    rows: list[dict[str, Any]] = state["rows"]
    return rows
