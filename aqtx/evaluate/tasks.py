"""lm-eval tasks on one model or several: per-item scores, intervals, paired differences.

All models answer the same items, so a difference is paired item by item and its interval is far narrower than that of
two accuracies. Nothing is fetched where `include_path` holds the tasks (see `aqtx.evaluate.task_files`).
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aqtx.errors import InputError, nearest
from aqtx.evaluate.task_code import refuse_code
from aqtx.numerics.intervals import Interval, bootstrap_ratio, paired_difference

METRICS = ("acc_norm", "acc", "exact_match")  # the first one that a task has is its headline


@dataclass(frozen=True)
class TaskScores:
    """One task's items as one model answered them."""

    task: str
    metric: str
    values: np.ndarray  # float64 [num_items]
    samples: list[dict[str, Any]]  # what lm-eval logged for each item

    def interval(self, seed: int = 0) -> Interval:
        """The mean with its interval."""
        return bootstrap_ratio(self.values, np.ones(len(self.values)), seed=seed)


def run_tasks(
    model: Any,
    tasks: Sequence[str],
    *,
    include_path: Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    allow_code: bool = False,
) -> dict[str, TaskScores]:
    """Scores of every task by name, the members of a group each on its own; nothing on ranks other than the first.

    Args:
        model: an lm-eval model, `aqtx.evaluate.lm.ProgramLM` or lm-eval's own.
        tasks: names of tasks or groups.
        include_path: folder of task files; names found there take precedence and need no network.
        limit: items per task.
        num_fewshot: examples in the prompt instead of the task's own number.
        allow_code: run the Python that files under `include_path` name; refused otherwise.
    """
    from lm_eval import simple_evaluate

    if include_path is not None and include_path.is_dir() and not allow_code:
        refuse_code(include_path)
    manager = _task_manager(tasks, include_path)
    loggers = logging.getLogger("lm_eval")
    level = loggers.level
    loggers.setLevel(logging.ERROR)  # its notes on every task would bury the table
    try:
        results = simple_evaluate(
            model=model,
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            num_fewshot=num_fewshot,
            bootstrap_iters=0,
            log_samples=True,
        )
    except ConnectionError as error:
        raise InputError(f"the data of {', '.join(tasks)} cannot be fetched: {error}; give --include-path") from error
    finally:
        loggers.setLevel(level)
    samples = {} if results is None else results["samples"]  # lm-eval tells the first rank of a machine alone
    return {name: _scores(name, rows) for name, rows in sorted(samples.items())}


def _task_manager(tasks: Sequence[str], include_path: Path | None) -> Any:
    from lm_eval.tasks import TaskManager

    if include_path is not None and not include_path.is_dir():
        raise InputError(f"the folder of tasks {include_path} does not exist")
    if include_path is not None:
        local = TaskManager(include_path=str(include_path), include_defaults=False)
        if all(name in local.all_tasks for name in tasks):
            return local
    manager = TaskManager(include_path=str(include_path) if include_path else None)
    unknown = [name for name in tasks if name not in manager.all_tasks]
    if unknown:
        raise InputError(*(f"unknown task {name!r}{nearest(name, manager.all_tasks)}" for name in unknown))
    return manager


def _scores(name: str, samples: list[dict[str, Any]]) -> TaskScores:
    """The headline metric of each item; of several filters (gsm8k) the last one is taken."""
    last = [sample for sample in samples if sample["filter"] == samples[-1]["filter"]]
    last.sort(key=lambda sample: sample["doc_id"])
    metric = next((key for key in METRICS if key in last[0]), None)
    if metric is None:
        raise InputError(f"task {name} reports none of {', '.join(METRICS)}")
    return TaskScores(name, metric, np.array([float(sample[metric]) for sample in last]), last)


def compare_tasks(arms: Mapping[str, Mapping[str, TaskScores]], *, seed: int = 0) -> dict[str, Any]:
    """Per task: each arm's interval and its paired difference to the first arm."""
    [reference, *others] = arms
    tables: dict[str, Any] = {}
    for name, first in arms[reference].items():
        entry: dict[str, Any] = {"metric": first.metric, "num_items": len(first.values), "arms": {}}
        entry["arms"][reference] = {"value": first.interval(seed).to_json(), "difference": None}
        for other in others:
            scores = arms[other][name]
            difference = paired_difference(first.values, scores.values, seed=seed)
            entry["arms"][other] = {"value": scores.interval(seed).to_json(), "difference": difference.to_json()}
        tables[name] = entry
    return tables


def answer_gaps(first: TaskScores, second: TaskScores) -> list[dict[str, Any]]:
    """Items on which two models differ, with both score gaps (best minus second best choice): how close it was."""
    rows = []
    for one, other, a, b in zip(first.samples, second.samples, first.values, second.values, strict=True):
        if a != b:
            rows.append({"item": one["doc_id"], "first": a, "second": b, "gaps": [_gap(one), _gap(other)]})
    return rows


def _gap(sample: Mapping[str, Any]) -> float | None:
    """Log-likelihood of the best choice over the second best; None for a generated answer."""
    try:
        ranked = sorted((float(answer[0]) for answer in sample["filtered_resps"]), reverse=True)
    except (TypeError, ValueError):
        return None
    return ranked[0] - ranked[1] if len(ranked) > 1 else None
