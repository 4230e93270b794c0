"""Run a recipe from checkpoint to report: trace, passes, evaluation before and after, write."""

import json
import shutil
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from aqtx.blockwise.block_scores import BlockScorer
from aqtx.checkpoint.locate import locate
from aqtx.checkpoint.write import write_model
from aqtx.errors import InputError
from aqtx.evaluate.perplexity import DocumentScores, evaluate_perplexity, window_of
from aqtx.evaluate.statistics import perplexity_report
from aqtx.evaluate.tasks import TaskScores
from aqtx.machine.files import read_json, read_record, write_record, write_text
from aqtx.machine.marker import add_names, claim, run_of
from aqtx.machine.memory import PeakMemory, peak_bytes, room_for_work
from aqtx.machine.one_dnn import keep_few_kernels
from aqtx.machine.ranks import ALONE, Ranks
from aqtx.program.accounting import account, original_bytes
from aqtx.program.codes import CODES
from aqtx.program.program import Program
from aqtx.registry import PASSES, Pass, Refusal
from aqtx.runs.directory import RunDirectory
from aqtx.runs.fingerprint import (
    SourceWatch,
    code_hash,
    first_difference,
    ids_hash,
    origin,
    versions,
)
from aqtx.runs.memory_needs import Need, needs
from aqtx.runs.opening import documents_of, program_of, recipe_context
from aqtx.runs.pipeline import Run
from aqtx.runs.preflight import preflight, unexportable, unread
from aqtx.runs.recipe import Recipe, load_recipe, parse_recipe
from aqtx.runs.resume_points import restore_state, save_state
from aqtx.runs.task_scores import score_tasks, tasks_report
from aqtx.text import own_text, self_sampling
from aqtx.text.tokens import Document


@dataclass(frozen=True)
class Report:
    """What a run measured (`report.json`), and where it lies."""

    directory: Path
    data: dict[str, Any]


def apply(recipe: str | Path | dict[str, Any], **overrides: Any) -> Report:
    """Run a recipe: a file, a shipped name, or its content as a dict.

    Args:
        recipe: what to do.
        overrides: recipe keys with `__` for dots (`model__source="tinymoe"`), and `resume` or `overwrite`.

    Raises:
        InputError: with every problem found.
    """
    resume, overwrite = (bool(overrides.pop(name, False)) for name in ("resume", "overwrite"))
    dotted = {key.replace("__", "."): value for key, value in overrides.items()}
    read = parse_recipe(recipe, dotted) if isinstance(recipe, dict) else load_recipe(recipe, dotted)
    return apply_recipe(read, resume=resume, overwrite=overwrite)


def apply_recipe(
    recipe: Recipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    ranks: Ranks = ALONE,
    tell: Callable[[list[Need]], None] | None = None,
) -> Report:
    """Run a validated recipe and write its output folder; with several ranks, each calls this with its own.

    `tell` is given what each stage needs of memory and disk, before anything is read.
    """
    if recipe.output is None:
        raise InputError("output: this key is required to apply a recipe")
    keep_few_kernels()
    with RunDirectory(Path(recipe.output), resume=resume, overwrite=overwrite, leads=ranks.leads) as directory:
        complete = resume and all(ranks.gather(directory.complete))
        if complete:
            return _finished(recipe, directory)
        runner = _Runner(recipe, directory, quiet, ranks)
        if tell is not None and ranks.leads:
            tell(needs(recipe, runner.program))
        return runner.run()


def _finished(recipe: Recipe, directory: RunDirectory) -> Report:
    """The report of a run that is complete, if it is of this recipe, these weights and this text."""
    now, before = origin(recipe, locate(recipe.model.source)), directory.fingerprint
    same = {key: before.get(key) for key in now}
    if difference := first_difference(same.pop("recipe"), now.pop("recipe")) or first_difference(same, now):
        raise InputError(f"output {directory.output} holds a finished run of another recipe: {difference}")
    directory.clean()
    return Report(directory.output, read_json(directory.output / "report.json"))


class _Runner:
    """One run; its methods are its stages, in order."""

    def __init__(self, recipe: Recipe, directory: RunDirectory, quiet: bool, ranks: Ranks) -> None:
        self.recipe = recipe
        self.directory = directory
        self.started = time.perf_counter()
        self.program = program_of(recipe)
        self.source = SourceWatch(self.program.folder)
        directory.refuse_source(self.program.folder)
        if problems := preflight(recipe, self.program):
            raise InputError(*problems)
        for sentence in unread(recipe) + unexportable(recipe, self.program):
            warnings.warn(sentence, stacklevel=2)
        self.ranks = ranks
        work = self.ranks.own_folder(directory.work)
        self.context = recipe_context(recipe, self.program, work=work, quiet=quiet or not ranks.leads)
        self.context.ranks = ranks
        self.rows: list[dict[str, Any]] = []
        self.evaluations: dict[str, dict[str, float]] = {}

    def run(self) -> Report:
        if not self.ranks.leads:
            return self._assist()
        documents = self._documents()
        self.directory.begin(self._fingerprint(documents))
        before_bytes = original_bytes(self.program)
        before = self._score(documents, "before")
        tasks_before = self._tasks("before")
        self.ranks.barrier()  # the others wait in `_assist`
        refusals = self._run_passes()
        after = self._score(documents, "after")
        tasks_after = self._tasks("after")
        staging = self.directory.staging
        write_model(self.program, staging)
        write_tables(self.program, self.recipe.passes, staging)
        self.source.check()
        for name in (self_sampling.FILE_NAME, own_text.FILE_NAME):
            if (self.directory.work / name).exists():  # it serves as `calibration.source` of later runs
                add_names(staging, [name])
                shutil.copyfile(self.directory.work / name, staging / name)
        accounting = account(self.program, {refusal.site for refusal in refusals})
        data = {
            "name": self.directory.output.name,
            "source": self.program.packed_source,
            **accounting.to_json(),
            "bytes": {"before": before_bytes, "after": accounting.bytes_after},
            **_perplexity(before, after, self.recipe.seed),
            "tasks": tasks_report(tasks_before, tasks_after, seed=self.recipe.seed),
            "passes": self.rows,
            "peak_memory_bytes": peak_bytes(),
            "seconds": round(time.perf_counter() - self.started, 2),
            "evaluations": self.evaluations,
            "versions": versions(),
            "settings": self.recipe.resolved(),
        }
        return self._write_report(data)

    def _assist(self) -> Report:
        """What a rank other than the first does: the passes, and its share of evaluation."""
        documents = self._documents()
        self._score(documents, "before")
        self._tasks("before")
        self.ranks.barrier()
        assert self.context.work is not None
        self.context.work.mkdir(parents=True, exist_ok=True)
        self._run_passes()
        self._score(documents, "after")
        self._tasks("after")
        return Report(self.directory.output, {})

    def _fingerprint(self, documents: list[Document] | None) -> dict[str, Any]:
        return {
            **origin(self.recipe, self.program.folder),
            "evaluation text": ids_hash(document.ids for document in documents or []),
            "code": code_hash(),
            "versions": versions(),
        }

    def _run_passes(self) -> list[Refusal]:
        assert self.context.work is not None
        self.program.codes.spill_to(self.context.work / CODES)
        self.rows = restore_state(self.program, self.directory.work)
        self.ranks.barrier()  # nobody moves the resume point while another reads it
        done = len(self.program.history)

        def after_pass(run: Run) -> None:
            self.source.check()
            self.rows.append(run.rows[-1].to_json())
            if self.ranks.leads:
                save_state(self.program, self.rows, self.directory.work)
            self.ranks.barrier()

        Run(self.program, self.context, first_place=done).execute(self.recipe.passes[done:], after_pass)
        deciding = [row for row in self.rows if PASSES[row["name"]].stage in ("plan", "round")]
        return [Refusal(**refusal) for row in deciding for refusal in row["refused"]]  # each leaves a weight as it is

    def _documents(self) -> list[Document] | None:
        spec = self.recipe.evaluate
        if spec is None or spec.perplexity is None:
            return None
        return documents_of(self.program, spec.perplexity, max_tokens=spec.max_tokens)

    def _score(self, documents: list[Document] | None, moment: str) -> DocumentScores | None:
        """Perplexity of the program as it stands, by all ranks; kept with the resume points, as all that is done."""
        if documents is None or self.recipe.evaluate is None:
            return None
        file = self.directory.work / f"scores-{moment}.json"
        if self.ranks.gather(file.exists())[0]:
            return DocumentScores.from_json(read_record(file))
        spec, started = self.recipe.evaluate, time.perf_counter()
        with PeakMemory() as peak:
            scores = evaluate_perplexity(
                replace(self._scorer(), record=f"scores-{moment}"),
                documents,
                window=window_of(self.program.config, spec.window),
                batch_size=spec.batch_size,
                progress=self.context.progress,
            )
        seconds = round(time.perf_counter() - started, 2)
        self.evaluations[moment] = {"seconds": seconds, "peak_memory_bytes": peak.num_bytes}
        if self.ranks.leads:
            write_record(file, scores.to_json())
        return scores

    def _scorer(self) -> BlockScorer:
        """The program as it stands, one block at a time where it does not fit."""
        context = self.context
        room = room_for_work(context.device, context.max_memory)
        return BlockScorer(self.program, room, context.work, context.progress, self.ranks)

    def _tasks(self, moment: str) -> dict[str, TaskScores]:
        """Scores of the recipe's tasks, by all ranks; every item's log stays in the run's folder."""
        spec = self.recipe.evaluate
        if spec is None or not spec.tasks:
            return {}
        log = self.directory.staging / "samples" / f"{moment}.json"
        record = self.directory.work / f"tasks-{moment}.json"
        scorer = replace(self._scorer(), record=f"tasks-{moment}")
        return score_tasks(self.program, spec, log, scorer, record)

    def _write_report(self, data: dict[str, Any]) -> Report:
        staging = self.directory.staging
        write_text(
            staging / "recipe.yaml",
            yaml.safe_dump({**data["settings"], "versions": data["versions"]}, sort_keys=False, allow_unicode=False),
        )
        write_text(staging / "report.json", json.dumps(data, indent=1) + "\n")
        if self.recipe.report:
            _draw(staging, self.directory.output)
        self.directory.finish()
        return Report(self.directory.output, data)


def _draw(staging: Path, output: Path) -> None:
    """The page and its figures; whatever goes wrong with them, the run they tell of is complete."""
    from aqtx.report.write import write_report  # draws: matplotlib takes a second that planning can do without

    try:
        write_report(staging)
    except Exception as error:  # noqa: BLE001 hours of work are not lost over a figure
        reason = " ".join(str(error).split()) or "no message"
        warnings.warn(
            f"the report of {output} cannot be drawn ({type(error).__name__}: {reason}); the checkpoint is complete, "
            f"and `aqtx report {output}` draws it again",
            stacklevel=2,
        )


def write_tables(program: Program, passes: Sequence[Pass], folder: Path) -> None:
    """Write the tables that passes make of a program; of two with one name the later pass's stays."""
    for step in passes:
        for name, text in step.tables(program).items():
            claim(folder, run_of(folder), [name])
            write_text(folder / name, text)


def _perplexity(before: DocumentScores | None, after: DocumentScores | None, seed: int) -> dict[str, Any]:
    if before is None or after is None:
        return {"perplexity": None, "perplexity_by_domain": {}}
    overall, by_domain = perplexity_report(before, after, seed=seed)
    return {"perplexity": overall, "perplexity_by_domain": by_domain}
