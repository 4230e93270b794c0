"""Other forms of a quantized checkpoint: plain weights that any tool loads.

A rotation that runs before a linear is undone in its weight, x Q W^T = x (W Q^T)^T, so that no tool
needs to know of it. Quantized activations have no plain form: they are left out, and told.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aqtx.checkpoint.shards import make_folder
from aqtx.checkpoint.write import copy_tokenizer, open_program
from aqtx.errors import InputError
from aqtx.models import supported
from aqtx.numerics.hadamard import hadamard
from aqtx.program.program import Program, Site

FORMS = ("dequantized",)


@dataclass(frozen=True)
class Exported:
    """A folder that was written; `activations` counts weights whose inputs are no longer quantized."""

    directory: Path
    bytes: int
    activations: int


def dequantized(source: str | Path, directory: str | Path, *, dtype: torch.dtype = torch.bfloat16) -> Exported:
    """Write a checkpoint with every weight dequantized and rounded once to `dtype`.

    Raises:
        InputError: the folder is not empty.
    """
    directory = Path(directory)
    make_folder(directory)
    if any(directory.iterdir()):
        raise InputError(f"{directory}: the folder is not empty; name another one")
    program = open_program(source, None)
    config = {key: value for key, value in program.config.items() if key not in ("quantization_config", "torch_dtype")}
    config["dtype"] = str(dtype).removeprefix("torch.")
    if supported(config):
        _write(plain_tensors(program, dtype), config, directory)
    else:
        _write_foreign(dict(plain_tensors(program, dtype)), config, directory)
    if program.folder is not None:
        copy_tokenizer(program.folder, directory)
    size = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    return Exported(directory, size, sum(edit["edit"] == "quantize_activation" for edit in program.edits))


def plain_tensors(program: Program, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """(key on disk, plain tensor) of every parameter, one matrix in memory at a time."""
    sites, tied, rotations = program.sites_by_weight(), program.tied(), running_rotations(program)
    for name in program.weights.names():
        if name in tied:
            continue
        if name not in sites:
            value = program.weights.get(name)  # a router's correction bias keeps its own precision
            yield name, value.to(dtype) if value.dtype == program.dtype else value
        for site in sites.get(name, []):
            yield f"{site.name}.weight", plain_matrix(program, site, rotations.get(name, [])).to(dtype)


def plain_matrix(program: Program, site: Site, rotations: list[dict[str, Any]]) -> Tensor:
    """The matrix [N, K] that acts on the unrotated input as the stored one does on the rotated; float64."""
    stored: Any = program.stored(site)
    matrix: Tensor = stored.dequantize(torch.float32) if hasattr(stored, "format_name") else stored
    matrix = matrix.double()
    for edit in reversed(rotations):
        matrix = hadamard(matrix, edit["block"], seed=edit["seed"], inverse=True)
    return matrix


def running_rotations(program: Program) -> dict[str, list[dict[str, Any]]]:
    """The rotations that run before each weight, in order."""
    found: dict[str, list[dict[str, Any]]] = {}
    for edit in program.edits:
        if edit["edit"] == "hadamard":
            found.setdefault(edit["weight"], []).append(edit)
        if edit["edit"] == "remove_hadamard":
            found[edit["weight"]].pop()
    return found


def _write(tensors: Iterator[tuple[str, Tensor]], config: dict[str, Any], directory: Path) -> None:
    import json

    from aqtx.checkpoint.shards import write_shards

    write_shards(tensors, directory)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _write_foreign(tensors: dict[str, Tensor], config: dict[str, Any], directory: Path) -> None:
    """Through transformers' own model, which knows the names and the fusing of its checkpoints."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    from aqtx.checkpoint.huggingface.skeleton import canonical_tensors
    from aqtx.program.names import NamesTable

    model: Any = AutoModelForCausalLM.from_config(CONFIG_MAPPING[config["model_type"]].from_dict(config))
    places = canonical_tensors(model)  # views: what is copied into them lands in the fused parameters
    table = NamesTable({name: tuple(place.shape) for name, place in places.items()})
    with torch.no_grad():
        for key, tensor in tensors.items():
            name, expert = table.from_disk[key]
            (places[name] if expert is None else places[name][expert]).copy_(tensor)
    model.to(next(iter(tensors.values())).dtype).save_pretrained(directory)
