"""What a recipe opens: its model, and the calibration text that passes are lent."""

from pathlib import Path

import torch

from aqtx.checkpoint.open import open_program
from aqtx.errors import InputError
from aqtx.machine.devices import device_of
from aqtx.program.program import Program
from aqtx.registry import Context
from aqtx.runs.recipe import Recipe
from aqtx.text import own_text, self_sampling
from aqtx.text.tokens import WRITTEN, calibration, load_tokenizer, start_of

_DTYPES = {"auto": None, "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def program_of(recipe: Recipe, *, config_only: bool = False) -> Program:
    """The recipe's model, traced, on the recipe's device; `config_only` reads nothing but config.json."""
    program = open_program(recipe.model.source, _DTYPES[recipe.model.dtype], config_only=config_only)
    return program.to(device_of(recipe.device))


def recipe_context(recipe: Recipe, program: Program, *, work: Path | None = None, quiet: bool = False) -> Context:
    """What passes of the recipe are lent: its seed, its device, its calibration text."""
    context = Context(seed=recipe.seed, device=program.device, work=work, quiet=quiet)
    context.max_memory = recipe.memory_limit
    context.load_calibration = lambda: calibration_of(recipe, program, context)
    return context


def calibration_of(recipe: Recipe, program: Program, context: Context) -> torch.Tensor:
    """Token ids: written by the model itself, or from text."""
    spec = recipe.calibration
    if spec.source in WRITTEN:
        folder = program.folder
        known = folder is not None and any(folder.glob("tokenizer*"))  # no tokenizer, nothing that it puts
        start = start_of(load_tokenizer(folder_of(program))) if known else []
        if spec.source == "self":
            return own_text.calibration(
                program, spec, recipe.seed, context.work, start=start, progress=context.progress
            )
        return self_sampling.calibration(program, spec, recipe.seed, context.work, start=start)
    return calibration(spec, load_tokenizer(folder_of(program)), recipe.seed, progress=context.progress)


def folder_of(program: Program) -> Path:
    """The folder that holds the model's tokenizer."""
    if program.folder is None:
        raise InputError("the model has no folder, so there is no tokenizer to read text with")
    return program.folder
