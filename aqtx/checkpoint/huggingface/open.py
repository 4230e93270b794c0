"""Programs over transformers' own modules: from a checkpoint folder, or from a model in memory."""

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from aqtx.checkpoint.huggingface.layout import PieceSource, layout_of
from aqtx.checkpoint.huggingface.names import to_disk
from aqtx.checkpoint.huggingface.skeleton import canonical_tensors, skeleton
from aqtx.checkpoint.reader import CheckpointReader
from aqtx.checkpoint.source import CheckpointSource
from aqtx.checkpoint.tied import untied
from aqtx.errors import InputError
from aqtx.models import build, supported
from aqtx.program.own_dtypes import keep_own
from aqtx.program.program import Program
from aqtx.program.trace import build_program
from aqtx.program.weights import ModuleSource

EXPECTED_SHARE = 0.9  # of the matrix weights, embeddings left out, must be sites
_LISTED = 5


def trace_foreign(config: Mapping[str, Any], source: Any, dtype: torch.dtype, folder: Path | None = None) -> Program:
    """Trace transformers' module of a config over a source of weights.

    Raises:
        InputError: the module cannot be exported, or too little of it would be reached.
    """
    made = skeleton(config)
    name = type(made).__name__
    try:
        program = build_program(lambda: made, source, config=dict(config), dtype=dtype, folder=folder)
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"transformers' {name} cannot be exported by torch.export: {reason}") from error
    check_reach(program, name)
    return program


def trace_loaded(model: nn.Module, dtype: torch.dtype | None = None) -> Program:
    """Trace a transformers model in memory; its weights are shared, not copied."""
    config: dict[str, Any] = model.config.to_dict()  # type: ignore[operator, union-attr]
    usual, tensors = next(model.parameters()).dtype, canonical_tensors(model)
    if supported(config):
        tensors = {to_disk(config["model_type"], name): tensor for name, tensor in tensors.items()}
        program = build_program(lambda: build(config), ModuleSource(tensors), config=config, dtype=dtype or usual)
    else:
        program = trace_foreign(config, ModuleSource(tensors), dtype or usual)
    keep_own(program, usual)
    return program


def foreign_source(
    reader: CheckpointReader, config: dict[str, Any], lazy: CheckpointSource
) -> tuple[Any, dict[str, Any]]:
    """`lazy`, which reads the folder's own names, where they fit; else what transformers' layouts lead to.

    Beside it the config, which no longer ties a head that the file holds with other values.
    """
    made = skeleton(config)
    names = dict(made.named_parameters())  # a tied head appears once, as on disk
    shapes = {name: tuple(value.shape) for name, value in names.items()}
    source: Any = lazy
    try:
        reader.check(shapes, quantized=lazy.formats, tied=made.state_dict().keys() - names.keys())
    except InputError:
        if lazy.formats:  # our own checkpoint has our own names: what is wrong with it is wrong
            raise
        source = _translated(reader, config)
    return source, untied(config, made, source.stored, reader.folder)


def fused_source(
    reader: CheckpointReader, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> PieceSource | None:
    """A source for one of our own families whose file is laid out in another way, None where it is not.

    Told by stacks of experts, which our names never have, and by the prefix of a model that also sees.
    """
    others = [key for key in reader.entries if key not in shapes]
    if not any(len(reader.shape(key)) == 3 or "language_model." in key for key in others):
        return None
    found = _translated(reader, config).pieces
    own_names = {to_disk(config["model_type"], name): piece for name, piece in found.items()}
    return PieceSource(own_names, reader.own_dtype)


def _translated(reader: CheckpointReader, config: Mapping[str, Any]) -> PieceSource:
    """The folder through transformers' layouts; what the model does without is told."""
    layout = layout_of(reader, config)
    if layout.left_out:
        told = f"{reader.folder}: {len(layout.left_out)} tensors are left out, first {layout.left_out[0]}"
        warnings.warn(told, stacklevel=2)
    return PieceSource(layout.pieces, reader.own_dtype)


def check_reach(program: Program, name: str) -> None:
    """Refuse a model of whose matrices too many are no sites.

    Raises:
        InputError: names the largest that are out of reach.
    """
    sites = {site.weight for site in program.sites()}
    embedded = {
        str(node.args[0])
        for node in program.graph.nodes
        if node.op == "call_function" and node.target is torch.ops.aten.embedding.default
    }
    tables = {str(node.target) for node in program.graph.nodes if node.op == "get_attr" and str(node) in embedded}
    sizes = {
        key: spec.numel for key, spec in program.weights.specs.items() if len(spec.shape) > 1 and key not in tables
    }
    reached = sum(size for key, size in sizes.items() if key in sites)
    if reached >= EXPECTED_SHARE * math.fsum(sizes.values()):
        return
    missed = sorted((key for key in sizes if key not in sites), key=lambda key: -sizes[key])[:_LISTED]
    raise InputError(
        f"transformers' {name}: only {reached / sum(sizes.values()):.0%} of its matrix weights are linear layers or "
        f"experts that aqtx reaches, at least {EXPECTED_SHARE:.0%} are expected; out of reach are {', '.join(missed)}"
    )
