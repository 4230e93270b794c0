"""Programs over transformers' own modules: from a checkpoint folder, or from a model in memory."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aqtx.checkpoint.huggingface.names import to_disk
from aqtx.checkpoint.huggingface.skeleton import canonical_tensors, skeleton
from aqtx.checkpoint.reader import CheckpointReader
from aqtx.errors import InputError
from aqtx.models import build, supported
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
    dtype = dtype or next(model.parameters()).dtype
    tensors = canonical_tensors(model)
    if not supported(config):
        return trace_foreign(config, ModuleSource(tensors), dtype)
    tensors = {to_disk(config["model_type"], name): tensor for name, tensor in tensors.items()}
    return build_program(lambda: build(config), ModuleSource(tensors), config=config, dtype=dtype)


def load_tensors(folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """All tensors of a checkpoint whose names only transformers can translate; they lie in memory.

    Raises:
        InputError: tensors are missing or of another shape; transformers would fill them at random.
    """
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    model, told = loaded
    problems = [f"{folder}: tensor {key} is missing" for key in sorted(told["missing_keys"])]
    problems += [f"{folder}: {entry} does not have the shape of the model" for entry in told["mismatched_keys"]]
    if problems:
        raise InputError(*problems)
    return canonical_tensors(model)


def foreign_source(reader: CheckpointReader, config: Mapping[str, Any], dtype: torch.dtype, lazy: Any) -> Any:
    """`lazy`, which reads the folder's own names, where they fit; else the whole model in memory."""
    made = skeleton(config)
    names = dict(made.named_parameters())  # a tied head appears once, as on disk
    shapes = {name: tuple(value.shape) for name, value in names.items()}
    try:
        reader.check(shapes, quantized=lazy.formats, tied=made.state_dict().keys() - names.keys())
    except InputError:
        if lazy.formats:  # our own checkpoint has our own names: what is wrong with it is wrong
            raise
        return ModuleSource(load_tensors(reader.folder, dtype))
    return lazy


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
