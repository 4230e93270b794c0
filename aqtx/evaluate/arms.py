"""Several models on the same text and tasks: the `aqtx eval` job, as data, as Markdown and as files."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aqtx.blockwise.block_scores import BlockScorer
from aqtx.checkpoint.huggingface.generate import generator_of
from aqtx.errors import InputError
from aqtx.evaluate.perplexity import DocumentScores, Progress, evaluate_perplexity, window_of
from aqtx.evaluate.spec import EvaluateSpec
from aqtx.evaluate.statistics import paired_change, perplexity_interval
from aqtx.evaluate.tasks import answer_gaps, compare_tasks, run_tasks
from aqtx.machine.files import write_text
from aqtx.machine.memory import room_for_work
from aqtx.program.generate import Continues
from aqtx.program.program import Program
from aqtx.program.token_ids import check_ids
from aqtx.report.numbers import interval
from aqtx.text.tokens import evaluation, load_tokenizer

WRITTEN = ("eval.json", "eval.md", "documents/*.json", "samples/*.jsonl", "differing/*.jsonl")


@dataclass
class EvalResults:
    """Scores of every arm, in the order given; the first is what the others are compared with."""

    seed: int = 0  # of the intervals
    perplexity: dict[str, DocumentScores] = field(default_factory=dict)
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)  # arm -> task -> TaskScores

    def to_json(self) -> dict[str, Any]:
        """Everything but the per-item logs."""
        text = {name: self._text(name) for name in self.perplexity}
        return {"perplexity": text, "tasks": compare_tasks(self.tasks, seed=self.seed) if self.tasks else {}}

    def _text(self, name: str) -> dict[str, Any]:
        seed, scores = self.seed, self.perplexity[name]
        reference = next(iter(self.perplexity.values()))
        domains = {
            domain: perplexity_interval(scores.of(domain), seed=seed) for domain in dict.fromkeys(scores.domains)
        }
        return {
            "value": perplexity_interval(scores, seed=seed).to_json(),
            "change": None if scores is reference else paired_change(reference, scores, seed=seed).to_json(),
            "by_domain": {domain: value.to_json() for domain, value in domains.items()},
            "num_tokens": int(scores.num_tokens.sum()),
            "window": scores.window,
        }

    def to_markdown(self) -> str:
        """A table of arms against measures; differences to the first arm stand beside each value."""
        data = self.to_json()
        lines = ["| model | measure | value [95 %] | difference to the first [95 %] |", "|---|---|---|---|"]
        for name, entry in data["perplexity"].items():
            change = interval(entry["change"], 4, signed=True)
            lines.append(
                f"| {name} | perplexity (difference in nats per token) | {interval(entry['value'])} | {change} |"
            )
        for task, entry in data["tasks"].items():
            for name, arm in entry["arms"].items():
                value, difference = interval(arm["value"], 4), interval(arm["difference"], 4, signed=True)
                lines.append(
                    f"| {name} | {task} {entry['metric']}, {entry['num_items']} items | {value} | {difference} |"
                )
        return "\n".join(lines) + "\n"

    def write(self, folder: Path) -> None:
        """eval.json, eval.md, a log of every item, and of the items that an arm answers unlike the first.

        samples/ARM.TASK.jsonl, differing/ARM.TASK.jsonl (with how close each answer was), documents/ARM.json.
        """
        write_text(folder / "eval.json", json.dumps(self.to_json(), indent=1) + "\n")
        write_text(folder / "eval.md", self.to_markdown())
        for name, scores in self.perplexity.items():
            write_text(folder / "documents" / f"{_file_name(name)}.json", json.dumps(scores.to_json()))
        reference = next(iter(self.tasks.values()), {})
        for name, tasks in self.tasks.items():
            for task, result in tasks.items():
                place = f"{_file_name(name)}.{task}.jsonl"
                write_text(folder / "samples" / place, _lines(result.samples))
                if tasks is not reference:
                    write_text(folder / "differing" / place, _lines(answer_gaps(reference[task], result)))


def evaluate_arms(
    arms: Mapping[str, Program],
    spec: EvaluateSpec,
    *,
    seed: int = 0,
    progress: Progress | None = None,
    max_memory: int | None = None,
) -> EvalResults:
    """Measure every arm. All must share one tokenizer's ids, or their perplexities would not pair.

    `seed` is of the intervals. An arm that does not fit into memory, or into `max_memory` bytes, runs one block at a
    time.
    """
    results = EvalResults(seed)
    for name, program in arms.items():
        if program.folder is None:
            raise InputError(f"{name} has no folder with a tokenizer, so no text can be scored")
        scorer = BlockScorer(program, room_for_work(program.device, max_memory))
        if spec.perplexity is not None:
            source, tokenizer = spec.perplexity, load_tokenizer(program.folder)
            documents = evaluation(source, tokenizer, max_tokens=spec.max_tokens)
            check_ids(program, (document.ids for document in documents), f"{name}: evaluation text {source!r}")
            results.perplexity[name] = evaluate_perplexity(
                scorer,
                documents,
                window=window_of(program.config, spec.window),
                batch_size=spec.batch_size,
                progress=progress,
            )
        if spec.tasks:
            results.tasks[name] = run_program_tasks(program, spec, scorer)
    return results


def run_program_tasks(program: Program, spec: EvaluateSpec, scorer: BlockScorer) -> dict[str, Any]:
    """Scores by task of one program, which needs a folder with a tokenizer.

    Raises:
        InputError: a task generates text and the model does not fit into memory.
    """
    from aqtx.evaluate.lm import ProgramLM  # brings lm-eval: seconds and 200 MB that only tasks need

    if program.folder is None:
        raise InputError("the model has no folder with a tokenizer, so no task can be run")
    model = ProgramLM(
        scorer,
        load_tokenizer(program.folder),
        max_length=window_of(program.config, spec.window),
        generator=lambda: _generator(program, scorer),
        batch_size=spec.batch_size,
    )
    return run_tasks(
        model,
        spec.tasks,
        include_path=Path(spec.include_path) if spec.include_path else None,
        limit=spec.limit,
        num_fewshot=spec.num_fewshot,
        allow_code=spec.allow_task_code,
    )


def _generator(program: Program, scorer: BlockScorer) -> Continues:
    """For tasks that generate: the whole model in memory."""
    if scorer.streams:
        need, have = scorer.model_bytes / 1e9, scorer.room / 1e9
        raise InputError(
            f"a task generates text, which needs the whole model in memory: {need:.2f} GB beside what it computes, "
            f"and {have:.2f} GB may be taken; raise max_memory, or leave the task out"
        )
    return generator_of(program)


def _file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name)


def _lines(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, default=str) + "\n" for row in rows)
