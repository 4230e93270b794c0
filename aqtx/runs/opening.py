"""What a recipe opens: its model, and the calibration text that passes are lent."""

from functools import partial
from pathlib import Path

import torch

from aqtx.blockwise.block_writer import routes_of, writer_of
from aqtx.checkpoint.open import open_program
from aqtx.errors import InputError
from aqtx.machine.devices import device_of
from aqtx.machine.memory import room_for_work
from aqtx.program.generate import Writes
from aqtx.program.program import Program
from aqtx.program.token_ids import check_ids, check_length
from aqtx.registry import Calibration, Context
from aqtx.runs.recipe import Recipe
from aqtx.text import own_text, self_sampling
from aqtx.text.calibration_spec import WRITTEN, CalibrationSpec
from aqtx.text.sources import UNNAMED
from aqtx.text.tokens import Document, calibration_by_domain, evaluation, load_tokenizer, start_of

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


def calibration_of(recipe: Recipe, program: Program, context: Context) -> Calibration:
    """Token ids by domain: written by the model itself, or from text; several sources are mixed by their weights.

    A part of a mixture is a domain, called as its text calls itself or else as its source.
    """
    check_length(program, recipe.calibration.sequence_length, "calibration: sequence_length")
    found = _calibration(recipe, program, context)
    check_ids(program, [found.ids], "calibration text")
    return found


def _calibration(recipe: Recipe, program: Program, context: Context) -> Calibration:
    spec = recipe.calibration
    if isinstance(spec.source, str):
        return _of_one_source(spec, recipe, program, context)
    found: dict[str, tuple[torch.Tensor, float]] = {}
    for source, part in spec.parts().items():
        text = _of_one_source(part, recipe, program, context)
        names = set(text.domains) - {UNNAMED}
        name = names.pop() if len(names) == 1 else source
        if name in found:
            raise InputError(f"calibration.source: two sources are of one domain, {name!r}; put their text together")
        found[name] = (text.ids, spec.weights[source])
    return Calibration.mix(found)


def _of_one_source(spec: CalibrationSpec, recipe: Recipe, program: Program, context: Context) -> Calibration:
    if spec.source not in WRITTEN:
        tokenizer = load_tokenizer(folder_of(program))
        return Calibration(*calibration_by_domain(spec, tokenizer, recipe.seed, progress=context.progress))
    start = start_tokens(program)
    if spec.source == "self":
        ids = own_writer(program, spec, context, start).text(context.work, context.progress)
    else:
        make = partial(routes_of, program, room_for_work(context.device, context.max_memory))
        ids = self_sampling.calibration(spec, recipe.seed, context.work, make, start=start)
    return Calibration(ids, (str(spec.source),) * len(ids))


def own_writer(program: Program, spec: CalibrationSpec, context: Context, start: list[int]) -> own_text.Writer:
    """What writes a program's own text, one block at a time where the model does not fit."""

    def make() -> Writes:
        room = room_for_work(context.device, context.max_memory)  # of this rank: either way writes the same text
        return writer_of(program, room, context.work, context.progress)

    return own_text.Writer(program, spec, context.seed, start, make)


def start_tokens(program: Program) -> list[int]:
    """What the model's tokenizer puts before every text; nothing where there is none."""
    folder = program.folder
    return start_of(load_tokenizer(folder)) if folder is not None and any(folder.glob("tokenizer*")) else []


def folder_of(program: Program) -> Path:
    """The folder that holds the model's tokenizer."""
    if program.folder is None:
        raise InputError("the model has no folder, so there is no tokenizer to read text with")
    return program.folder


def documents_of(program: Program, source: str, **limits: int | None) -> list[Document]:
    """Evaluation documents of a text source for a program: see `aqtx.text.tokens.evaluation`."""
    documents = evaluation(source, load_tokenizer(folder_of(program)), **limits)
    check_ids(program, (document.ids for document in documents), f"evaluation text {source!r}")
    return documents
