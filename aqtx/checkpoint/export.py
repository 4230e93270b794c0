"""Other forms of a quantized checkpoint: plain weights that any tool loads.

A rotation that runs before a linear is undone in its weight, x Q W^T = x (W Q^T)^T, so that no tool
needs to know of it. Quantized activations have no plain form: they are left out, and told.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aqtx.checkpoint.huggingface.skeleton import canonical_tensors
from aqtx.checkpoint.open import open_program
from aqtx.checkpoint.shards import write_shards
from aqtx.checkpoint.write import copy_tokenizer
from aqtx.errors import InputError
from aqtx.formats import dequantized
from aqtx.machine.files import make_folder
from aqtx.models import supported
from aqtx.program.edits import Edit, QuantizeActivation, by_weight, in_force
from aqtx.program.names import NamesTable
from aqtx.program.program import Program
from aqtx.program.site import Site

FORMS = ("dequantized",)


@dataclass(frozen=True)
class Exported:
    """A folder that was written; `activations` counts weights whose inputs are no longer quantized."""

    directory: Path
    bytes: int
    activations: int


def export_dequantized(source: str | Path, directory: str | Path, *, dtype: torch.dtype = torch.bfloat16) -> Exported:
    """Write a checkpoint with every weight dequantized and rounded once to `dtype`.

    Raises:
        InputError: the folder is not empty.
    """
    directory = Path(directory)
    make_folder(directory)
    if any(directory.iterdir()):
        raise InputError(f"{directory}: the folder is not empty; name another one")
    program = open_program(source, None, check_files=True)
    config = {key: value for key, value in program.config.items() if key not in ("quantization_config", "torch_dtype")}
    config["dtype"] = str(dtype).removeprefix("torch.")
    if supported(config):
        _write(plain_tensors(program, dtype), config, directory)
    else:
        _write_foreign(dict(plain_tensors(program, dtype)), config, directory)
    if program.folder is not None:
        copy_tokenizer(program.folder, directory)
    size = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    return Exported(directory, size, sum(isinstance(edit, QuantizeActivation) for edit in program.edits))


def plain_tensors(program: Program, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """(key on disk, plain tensor) of every parameter, one matrix in memory at a time."""
    sites, tied, edits = program.sites_by_weight(), program.tied(), by_weight(program.edits)
    for name in program.weights.names():
        if name in tied:
            continue
        if name not in sites:
            value = program.weights.get(name)  # a router's correction bias keeps its own precision
            yield name, value.to(dtype) if value.dtype == program.dtype else value
        for site in sites.get(name, []):
            yield f"{site.name}.weight", plain_matrix(program, site, in_force(edits.get(name, []))).to(dtype)


def plain_matrix(program: Program, site: Site, edits: list[Edit]) -> Tensor:
    """The matrix [N, K] that acts on the plain input as the stored one does behind its edits; float64."""
    matrix = dequantized(program.stored(site), torch.float32).double()
    for edit in reversed(edits):
        undone = edit.undo(matrix)
        matrix = matrix if undone is None else undone
    return matrix


def _write(tensors: Iterator[tuple[str, Tensor]], config: dict[str, Any], directory: Path) -> None:
    write_shards(tensors, directory)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _write_foreign(tensors: dict[str, Tensor], config: dict[str, Any], directory: Path) -> None:
    """Through transformers' own model, which knows the names and the fusing of its checkpoints."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_config(CONFIG_MAPPING[config["model_type"]].from_dict(config))
    places = canonical_tensors(model)  # views: what is copied into them lands in the fused parameters
    table = NamesTable({name: tuple(place.shape) for name, place in places.items()})
    with torch.no_grad():
        for key, tensor in tensors.items():
            name, expert = table.from_disk[key]
            (places[name] if expert is None else places[name][expert]).copy_(tensor)
    model.to(next(iter(tensors.values())).dtype).save_pretrained(directory)
