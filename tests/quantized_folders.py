"""Quantized checkpoints for the tests of exports: a format for each pattern of sites, rounded to nearest."""

import json
import shutil
from pathlib import Path

import aqtx
from aqtx.checkpoint.locate import shipped
from aqtx.passes.assign_plan import AssignPlan
from aqtx.passes.emit import Emit
from aqtx.passes.quantize import Quantize

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def quantized(source: str | Path, folder: Path, formats: dict[str, str], **schemes: str) -> Path:
    """`source` rounded to formats by glob; what no glob matches stays. `schemes` are further keys, `aq="int8_row"`."""
    plan = {
        "default": {"wq": "none"},
        "overrides": [{"pattern": pattern, "wq": name, **schemes} for pattern, name in formats.items()],
    }
    program = aqtx.run(aqtx.trace(source), [AssignPlan(method="manual", plan=plan), Quantize(), Emit()])
    aqtx.save(program, folder)
    return folder


def with_tokenizer(folder: Path) -> Path:
    """The folder with the shipped model's tokenizer; its vocabulary must be as large."""
    for name in TOKENIZER_FILES:
        shutil.copyfile(shipped()["tinymoe"] / name, folder / name)
    return folder


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())
