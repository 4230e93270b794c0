"""From a place or a module to a `Program`: a folder, a shipped or hub name, a model in memory."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aqtx.checkpoint.checks import check_named_weights, read_quantization, verify
from aqtx.checkpoint.exports.gguf_source import GgufSource
from aqtx.checkpoint.huggingface.open import foreign_source, fused_source, trace_foreign, trace_loaded
from aqtx.checkpoint.locate import locate
from aqtx.checkpoint.packed.open import open_reader, packing_of, plain_config
from aqtx.checkpoint.reader import CheckpointReader, declared_dtype
from aqtx.checkpoint.source import CheckpointSource
from aqtx.checkpoint.tied import untied
from aqtx.errors import InputError, Notice, malformed
from aqtx.models import build, load_config, supported
from aqtx.models.on_disk import left_out
from aqtx.program.edits import edit_from_json
from aqtx.program.own_dtypes import keep_own
from aqtx.program.program import Program
from aqtx.program.trace import build_program, copy_on_meta
from aqtx.program.weights import ModuleSource

_UNTRACED = "{folder}/config.json: no model can be made of these settings together"


def trace(source: str | Path | nn.Module, dtype: torch.dtype | None = None) -> Program:
    """Trace a local folder, shipped name, hub name or module into a Program.

    Args:
        source: where the model is; a module must map `ids [B, S]` to `logits [B, S, V]`.
        dtype: computing dtype of the graphs; None keeps the checkpoint's.

    Raises:
        InputError: the source cannot be found, read or is of an unsupported architecture.
    """
    if isinstance(source, nn.Module):
        return trace_module(source, dtype)
    return open_program(source, dtype)


def trace_module(model: nn.Module, dtype: torch.dtype | None = None) -> Program:
    """Trace a module in memory; its weights are shared, not copied."""
    if hasattr(getattr(model, "config", None), "model_type"):
        return trace_loaded(model, dtype)
    usual = next(model.parameters()).dtype
    config = getattr(model, "hf_config", {})
    source = ModuleSource(model.state_dict(keep_vars=True))
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    with torch.device("meta"):
        blank = copy_on_meta(model)
    program = build_program(lambda: blank, source, config=dict(config), dtype=dtype or usual, buffers=buffers)
    keep_own(program, usual)
    return program


def load(directory: str | Path, *, verify: bool = False) -> Program:
    """Open a checkpoint folder that `save` or `aqtx apply` wrote; logits are bit-equal to those before saving.

    `verify` also compares every file with its SHA-256 in checksums.json, which reads all of them.
    """
    return open_program(directory, None, check_files=verify)


def open_program(
    source: str | Path, dtype: torch.dtype | None, *, config_only: bool = False, check_files: bool = False
) -> Program:
    """A Program over a checkpoint: local folder, shipped name or hub name, quantized or not.

    `check_files` compares every file with the checksum that was written beside it, where there is one.
    """
    if Path(source).suffix == ".gguf" and Path(source).is_file():
        return _open_gguf(Path(source), dtype)
    folder = locate(source)
    config = load_config(folder)
    check_named_weights(config, folder)
    packing = packing_of(config, folder)
    formats, edits = read_quantization(config, folder)
    if check_files:
        verify(folder)
    if config_only:
        return _without_weights(plain_config(config, packing), dtype, folder)
    reader = open_reader(folder, config, dtype)
    if reader.found is not None:
        warnings.warn(f"source: {reader.found}", Notice, stacklevel=2)
    config = plain_config(config, packing)
    dtype = dtype or reader.dtype()
    weights = CheckpointSource(reader, formats, dtype)
    if supported(config):
        with malformed(_UNTRACED.format(folder=folder)):
            program = _open_own(reader, weights, config, dtype)
    else:
        places, config = foreign_source(reader, config, weights)
        program = trace_foreign(config, places, dtype, folder)
    weights.shapes = {name: spec.shape for name, spec in program.weights.specs.items()}
    program.weights.formats = formats
    keep_own(program, reader.dtype())
    program.packed_source = reader.found
    program.edit(*map(edit_from_json, edits))
    return program


def _open_own(
    reader: CheckpointReader, weights: CheckpointSource, config: dict[str, Any], dtype: torch.dtype
) -> Program:
    """A Program of one of our own families; its tensors lie under our names, or as transformers lays them out."""
    folder = reader.folder
    with torch.device("meta"):
        model = build(config)
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    laid_out = None if weights.formats else fused_source(reader, config, shapes)
    source = weights if laid_out is None else laid_out
    config = untied(config, model, source.stored, folder)
    program = build_program(lambda: build(config), source, config=config, dtype=dtype, folder=folder)
    tied = program.weights.tied
    wanted = {name: spec.shape for name, spec in program.weights.specs.items() if name not in tied}
    if laid_out is not None:
        laid_out.check(wanted, folder)
        return program
    spare = [key for key in reader.entries if left_out(config, key)]
    if spare:
        warnings.warn(f"{folder}: {len(spare)} tensors are left out, first {spare[0]}", stacklevel=3)
    reader.check(wanted, quantized=weights.formats, tied=tied, left_out=spare)
    return program


def _open_gguf(file: Path, dtype: torch.dtype | None) -> Program:
    """A Program over the decoded weights of a file that `aqtx export` wrote."""
    with malformed(f"{file}: no model can be made of this file"):
        source = GgufSource(file)
        config = source.config
        if not supported(config):
            raise InputError(f"{file}: model_type {config.get('model_type')!r} is none that aqtx builds itself")
        program = build_program(
            lambda: build(config), source, config=config, dtype=dtype or source.dtype, folder=source.folder
        )
        source.check(
            {name: spec.shape for name, spec in program.weights.specs.items() if name not in program.weights.tied}
        )
    return program


def _without_weights(config: dict[str, Any], dtype: torch.dtype | None, folder: Path) -> Program:
    """A Program of a config.json alone; reading a weight is an error."""
    dtype, source = dtype or declared_dtype(config, folder), _NoWeights(folder)
    with malformed(_UNTRACED.format(folder=folder)):
        if not supported(config):
            return trace_foreign(config, source, dtype, folder)
        return build_program(lambda: build(config), source, config=config, dtype=dtype, folder=folder)


@dataclass(frozen=True)
class _NoWeights:
    """In the place of weights where only config.json is looked at."""

    folder: Path

    def parameter(self, name: str) -> Tensor:
        raise InputError(f"{self.folder}: {name} cannot be read, since only config.json was opened")

    def expert(self, name: str, index: int) -> Tensor:
        return self.parameter(name)

    def own_dtype(self, name: str) -> torch.dtype | None:
        return None
