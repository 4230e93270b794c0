"""The tasks of a recipe's `evaluate` section: run before and after the passes, paired, logged item by item."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from aqtx.blockwise.block_scores import BlockScorer
from aqtx.errors import InputError, malformed
from aqtx.evaluate.arms import run_program_tasks
from aqtx.evaluate.spec import EvaluateSpec
from aqtx.evaluate.tasks import TaskScores
from aqtx.machine.files import make_folder, read_record, text_digest, write_record, write_text
from aqtx.numerics.intervals import paired_difference
from aqtx.program.program import Program


def score_tasks(
    program: Program, spec: EvaluateSpec, log: Path, scorer: BlockScorer, record: Path
) -> dict[str, TaskScores]:
    """Scores by task of a program as it stands, by all ranks of the scorer; none on others than the first.

    `log` keeps every item, and is read instead of a second run. `record` is a resume point with the log's digest. Both
    are the first rank's.

    Raises:
        InputError: the log is not what was written.
    """
    ranks = scorer.ranks
    done = ranks.gather(record.exists())[0]
    if not ranks.leads:
        if not done:
            run_program_tasks(program, spec, scorer)
        return {}
    if done:
        text = log.read_text() if log.is_file() else ""
        if text_digest(text) != read_record(record):
            raise InputError(
                f"{log}: resume data is missing or damaged (its SHA-256 differs); start again with --overwrite"
            )
        with malformed(f"{log}: resume data of another version; start again with --overwrite"):
            return {name: _from_json(name, data) for name, data in json.loads(text).items()}
    scores = run_program_tasks(program, spec, scorer)
    make_folder(log.parent)
    text = json.dumps({name: _to_json(found) for name, found in scores.items()}, default=str)
    write_text(log, text)
    write_record(record, text_digest(text))
    return scores


def tasks_report(
    before: Mapping[str, TaskScores], after: Mapping[str, TaskScores], *, seed: int
) -> dict[str, dict[str, Any]]:
    """The `tasks` entry of report.json."""
    return {
        name: {
            "metric": first.metric,
            "num_items": len(first.values),
            "before": first.interval(seed).to_json(),
            "after": after[name].interval(seed).to_json(),
            "change": paired_difference(first.values, after[name].values, seed=seed).to_json(),
        }
        for name, first in before.items()
    }


def _to_json(scores: TaskScores) -> dict[str, Any]:
    return {"metric": scores.metric, "values": scores.values.tolist(), "samples": scores.samples}


def _from_json(name: str, data: dict[str, Any]) -> TaskScores:
    return TaskScores(name, data["metric"], np.array(data["values"], dtype=np.float64), data["samples"])
