"""Plan, round and score every arm of a study; a study that was stopped goes on with what it has scored."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from aqtx.errors import InputError
from aqtx.evaluate.divergence import evaluate_divergence
from aqtx.evaluate.perplexity import DocumentScores, evaluate_perplexity, window_of
from aqtx.evaluate.spec import EvaluateSpec
from aqtx.machine.command_output import kept_folder
from aqtx.machine.files import read_record, write_record, write_text
from aqtx.machine.marker import claim
from aqtx.machine.output_folder import output_beside
from aqtx.planning.arms import Arm, StudySpec
from aqtx.planning.options import unmet
from aqtx.planning.settings import Settings
from aqtx.program.accounting import kept_bytes
from aqtx.program.plan import Plan
from aqtx.program.program import Program
from aqtx.registry import Calibration, Context, Pass, annotator
from aqtx.runs.fingerprint import code_hash, ids_hash, source_hashes
from aqtx.runs.opening import documents_of, program_of, recipe_context, start_tokens
from aqtx.runs.pipeline import Run, misfits
from aqtx.runs.recipe import Recipe
from aqtx.schema import plain
from aqtx.sensitivity.rounded_model import RoundedModel
from aqtx.study.correlate import Truth, correlations, held_out, measure_truth
from aqtx.study.domains import measure_regrets
from aqtx.study.plans import plan_arm
from aqtx.study.quick import Quick, quick_verdict
from aqtx.study.verdict import Point, study_json, study_markdown
from aqtx.text.tokens import Document

_FILES = ("study.json", "study.md")

_FILES = ("study.json", "study.md")


@dataclass
class Study:
    """One study on its way."""

    recipe: Recipe
    spec: StudySpec
    directory: Path
    program: Program
    context: Context
    documents: list[Document]
    calibrated: dict[str, Any] = field(default_factory=dict)
    quick: Quick | None = None
    seconds: dict[str, float] = field(default_factory=dict)  # that each arm took to measure what arms before it had not

    def run(self) -> dict[str, Any]:
        """Score all arms, measure the truth on a sample of sites, and write study.json, study.md and the page."""
        settings = _settings(self.recipe)
        model = RoundedModel(self.program, self.context.room(), self.context.work)
        before = self._scores(model, {}, "before")
        arms = self.spec.arms(settings)
        points = [self._point(model, arm) for arm in self.context.progress(arms, description="study")]
        truth: Truth = measure_truth(self.program, settings, self.context, self.spec.trial_seconds, self._texts[1].ids)
        data = study_json(before, points, self.recipe.seed)
        data["correlations"] = correlations(self.program, truth, arms)
        if self.spec.domains:
            score = partial(self._divergence, model)
            data["domains"] = measure_regrets(self.program, settings, self.spec.average_bits, self._planning, score)
        data |= {
            "quick": None if self.quick is None else self.quick.to_json(),
            "trials": len(truth.sites),
            "calibrated": self.calibrated,
            "seconds": self.seconds,
            "settings": self.recipe.resolved(),
        }
        claim(self.directory, "study", _FILES)
        write_text(self.directory / "study.json", json.dumps(data, indent=1) + "\n")
        write_text(self.directory / "study.md", study_markdown(data))
        return data

    @cached_property
    def _texts(self) -> tuple[Calibration, Calibration]:
        """Calibration sequences that methods see, and those that the truth is measured on."""
        return held_out(self.context.by_domain(), _settings(self.recipe).trial_sequences)

    @cached_property
    def _planning(self) -> Context:
        """What methods are lent."""
        return replace(self.context, load_calibration=lambda: self._texts[0], _calibration=None)

    @cached_property
    def _fingerprint(self) -> list[Any]:
        """What scores depend on beside the plan: the model's files, the text and how it is cut, our own code."""
        folder = self.program.folder
        evaluate = None if self.recipe.evaluate is None else plain(self.recipe.evaluate)
        text = ids_hash(document.ids for document in self.documents)
        source = {} if folder is None else source_hashes(folder)
        return [source, text, evaluate, str(self.program.dtype), code_hash()]

    def _point(self, model: RoundedModel, arm: Arm) -> Point:
        plan, details = plan_arm(self.program, arm, self._planning)
        self.calibrated |= details.get("calibrated", {})
        if "seconds" in details:
            self.seconds[arm.name] = max(details["seconds"], self.seconds.get(arm.name, 0.0))
        formats = {name: entry.format for name, entry in plan.sites.items()}
        return Point(arm.name, arm.bits, arm.seed, self._bytes(plan), plan, self._scores(model, formats, arm.file_name))

    def _bytes(self, plan: Plan) -> int:
        """Bytes of the whole model under a plan."""
        planned = [site for site in self.program.sites() if site.name in plan.planned]
        return kept_bytes(self.program, planned) + sum(entry.bytes for entry in plan.planned.values())

    def _scores(self, model: RoundedModel, formats: Mapping[str, str | None], name: str) -> DocumentScores:
        """Scores of the model under a plan, kept by the plan's content."""
        return self._kept(formats, name, lambda: evaluate_perplexity(model.use(formats), self.documents, **self._cut))

    def _divergence(self, model: RoundedModel, formats: Mapping[str, str | None], name: str) -> DocumentScores:
        """Divergences from the unrounded model in the place of losses, kept in the same way."""

        def measure() -> DocumentScores:
            [found] = evaluate_divergence(model.use({}), [model.use(formats)], self.documents, **self._cut)
            return found.divergence

        return self._kept(formats, f"divergence-{name}", measure)

    @property
    def _cut(self) -> dict[str, Any]:
        """How documents are given to the model."""
        spec = self.recipe.evaluate or EvaluateSpec(perplexity="builtin")
        return {"window": window_of(self.program.config, spec.window), "batch_size": spec.batch_size}

    def _kept(
        self, formats: Mapping[str, str | None], name: str, measure: Callable[[], DocumentScores]
    ) -> DocumentScores:
        told = json.dumps([formats, self._fingerprint], sort_keys=True)
        file = self.directory / "scores" / f"{name}-{hashlib.sha256(told.encode()).hexdigest()[:12]}.json"
        with suppress(InputError):  # torn, damaged or of an older version: scored again
            return DocumentScores.from_json(read_record(file))
        claim(self.directory, "study", [*_FILES, file.relative_to(self.directory).as_posix()])
        scores = measure()
        write_record(file, scores.to_json())
        return scores


def _settings(recipe: Recipe) -> Settings:
    """The recipe's `assign_plan`, whose fields all arms share."""
    found = [step for step in recipe.passes if isinstance(step, Settings)]
    if not found:
        raise InputError("passes: there is no `assign_plan`, so a study has no candidates and nothing to keep")
    return found[0]


def _problems(recipe: Recipe, spec: StudySpec, program: Program) -> list[str]:
    """What does not fit the model, by the recipe's own passes and by each arm: told before an hour of work."""
    passes = [step for step in recipe.passes if step.stage in ("annotate", "plan")]
    found = misfits(program, passes)
    arms = [] if found else [arm for arm in spec.arms(_settings(recipe)) if not arm.settings.row.nominal]
    return list(
        dict.fromkeys(found + [f"study: {problem}" for arm in arms for problem in unmet(program, arm.settings)])
    )


def study_recipe(
    recipe: Recipe, spec: StudySpec, *, quiet: bool = False, tell: Callable[[Quick], None] = lambda _: None
) -> tuple[dict[str, Any], Path]:
    """Run a study; returns the content of study.json and the folder, `<output>.study`.

    `tell` is given a quick verdict on alpha before the long part begins.
    """
    with kept_folder(output_beside(recipe.output, "study"), _FILES) as directory:
        if problems := _problems(recipe, spec, program := program_of(recipe)):
            raise InputError(*problems)
        context = recipe_context(recipe, program, quiet=quiet)
        return _study(recipe, spec, directory, program, context, tell), directory


def _study(
    recipe: Recipe,
    spec: StudySpec,
    directory: Path,
    program: Program,
    context: Context,
    tell: Callable[[Quick], None],
) -> dict[str, Any]:
    Run(program, context).execute(_annotations(recipe.passes))
    tell(quick := quick_verdict(program, _settings(recipe), context, start_tokens(program)))
    evaluate = recipe.evaluate or EvaluateSpec(perplexity="builtin")
    source = evaluate.perplexity or "builtin"
    documents = documents_of(program, source, max_tokens=evaluate.max_tokens, max_document=spec.max_document)
    study = Study(recipe, spec, directory, program, context, documents, quick=quick)
    return study.run()


def quick_recipe(recipe: Recipe, *, quiet: bool = False) -> Quick:
    """The quick verdict alone; writes nothing."""
    program = program_of(recipe)
    passes = [step for step in recipe.passes if step.stage in ("annotate", "plan")]
    if problems := misfits(program, passes):
        raise InputError(*problems)
    context, settings = recipe_context(recipe, program, quiet=quiet), _settings(recipe)
    Run(program, context).execute(_annotations([step for step in passes if "alpha" in step.annotates]))
    return quick_verdict(program, settings, context, start_tokens(program))


def _annotations(passes: Sequence[Pass]) -> list[Pass]:
    """The recipe's annotating passes; alphas are always needed."""
    own = [step for step in passes if step.stage == "annotate"]
    missing = annotator("alpha") if not any("alpha" in step.annotates for step in own) else None
    return own if missing is None else [missing(), *own]
