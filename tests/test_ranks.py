"""One run on two processes: the same plan, the same codes up to the order of a sum, and a rank that dies."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import aqtx
from aqtx.checkpoint.locate import locate
from aqtx.evaluate import task_files
from aqtx.formats import MixedExperts, QuantizedTensor
from tests.task_wheel import build_wheel
from tests.tiny import OLMOE, write_checkpoint

PASSES = [
    {"annotate_alpha": {}},
    {"assign_plan": {"method": "alpha", "candidates": ["mxfp4", "mxfp8"], "average_bits": 6.0, "keep": ["lm_head"]}},
    {"gptq": {"tokens_per_batch": 128}},
    "emit",
]

EVALUATE = {"perplexity": "builtin", "max_tokens": 3000, "window": 128, "batch_size": 4}


def write_recipe(folder: Path, passes: list[Any] = PASSES, **more: Any) -> Path:
    """A recipe over a tiny model that reads the shipped text with the shipped tokenizer."""
    source = write_checkpoint(folder / "source", OLMOE | {"vocab_size": 4096, "max_position_embeddings": 1024})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).write_bytes((locate("tinymoe") / name).read_bytes())
    recipe = {"version": 1, "seed": 0, "model": {"source": str(source), "dtype": "float32"}, "passes": passes}
    recipe |= {
        "calibration": {"source": "builtin", "num_sequences": 12, "sequence_length": 64},
        "report": False,
        **more,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def start(ranks: int, recipe: Path, output: Path, *options: str) -> subprocess.Popen[str]:
    """`aqtx apply` on so many processes."""
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone", "--no-python"]
    words = [sys.executable, "-m", "aqtx", "apply", str(recipe), f"output={output}", *options]
    launched = [sys.executable, *launcher, *words] if ranks > 1 else words
    return subprocess.Popen(launched, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(process: subprocess.Popen[str]) -> str:
    """What a run that succeeds prints."""
    out, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    return out


def assert_same_run(one: Path, other: Path) -> None:
    """Equal plans; codes of the first block equal but where moments, summed in another order, tip a rounding.

    Behind it every block sees inputs that have changed, and descent over codes carries a tipped one on: there the
    errors of rounding are compared, not the codes.
    """
    assert (one / "plan.json").read_text() == (other / "plan.json").read_text()
    first, second = (aqtx.load(folder).weights for folder in (one, other))
    differing = total = 0
    for name in first.names():
        if ".layers.1." in name:
            continue
        a, b = values(first.get(name)), values(second.get(name))
        differing += int((a != b).sum())
        total += a.numel()
    assert differing / total < 1e-3


def values(weight: Any) -> torch.Tensor:
    """A parameter as plain numbers."""
    quantized = isinstance(weight, QuantizedTensor | MixedExperts)
    plain: torch.Tensor = weight.dequantize() if quantized else weight
    return plain


@pytest.mark.slow
def test_two_ranks_share_fisher_information_and_evaluation(tmp_path: Path) -> None:
    """Each runs its own sequences, with the labels that one process would draw: same plan and scores, byte for byte."""
    plan = {"method": "fisher", "candidates": ["mxfp4", "mxfp8"], "average_bits": 6.0, "keep": ["lm_head"]}
    recipe = write_recipe(tmp_path, [{"assign_plan": plan}, "quantize", "emit"], evaluate=EVALUATE)
    for process in [start(ranks, recipe, tmp_path / f"out-{ranks}") for ranks in (1, 2)]:
        finished(process)
    one, two = ((tmp_path / f"out-{ranks}" / "plan.json").read_text() for ranks in (1, 2))
    assert one == two
    told = [json.loads((tmp_path / f"out-{ranks}" / "report.json").read_text()) for ranks in (1, 2)]
    assert told[0]["perplexity"] == told[1]["perplexity"] and told[0]["perplexity"]["num_tokens"] > 1000


@pytest.mark.slow
def test_two_ranks_share_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Choices, which stream under a limit or not, and generated text: every item is answered as one process does."""
    wheel, folder = build_wheel(tmp_path), tmp_path / "tasks"
    assert task_files.main([str(wheel), str(folder)]) == 0
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    plan = {"method": "uniform", "candidates": ["mxfp4"], "keep": ["lm_head"]}
    asked = {"tasks": ["hellaswag", "gsm8k"], "num_fewshot": 0, "include_path": str(folder), "batch_size": 2}
    recipe = write_recipe(tmp_path, [{"assign_plan": plan}, "quantize", "emit"], evaluate=asked)
    told = []
    for ranks in (1, 2):
        monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / f"cache-{ranks}"))
        finished(start(ranks, recipe, tmp_path / f"out-{ranks}"))
        output = tmp_path / f"out-{ranks}"
        tasks = json.loads((output / "report.json").read_text())["tasks"]
        told.append((tasks, *((output / "samples" / f"{when}.json").read_text() for when in ("before", "after"))))
    assert told[0] == told[1]
    assert {name: entry["num_items"] > 1 for name, entry in told[0][0].items()} == {"hellaswag": True, "gsm8k": True}


def test_two_ranks_do_what_one_does(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    runs = {ranks: start(ranks, recipe, tmp_path / f"out-{ranks}") for ranks in (1, 2)}
    printed = {ranks: finished(process) for ranks, process in runs.items()}
    assert_same_run(tmp_path / "out-1", tmp_path / "out-2")
    assert printed[2].count("out-2") == 1, "only one rank prints"
    told = [json.loads((tmp_path / f"out-{ranks}" / "report.json").read_text()) for ranks in (1, 2)]
    rows = [next(row for row in report["passes"] if row["name"] == "gptq")["details"]["sites"] for report in told]
    assert [row["site"] for row in rows[0]] == [row["site"] for row in rows[1]]
    errors = [sum(row["error_after"] for row in table) for table in rows]
    assert errors[0] == pytest.approx(errors[1], rel=0.02)
    tokens = [[row["tokens"] for row in table if ".layers.0." in row["site"]] for table in rows]
    assert tokens[0] == tokens[1]
    assert not (tmp_path / "out-2.partial").exists()


@pytest.mark.slow
def test_a_dead_rank_ends_the_run_and_the_run_resumes(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    process = start(2, recipe, tmp_path / "out")
    record = tmp_path / "out.partial" / "work" / "gptq-2" / "block-1.json"
    while not record.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    os.kill(max(children_of(process.pid)), signal.SIGKILL)
    _, errors = process.communicate(timeout=600)
    assert process.returncode != 0
    assert "another rank of this run is gone" in errors or "Signal 9" in errors
    finished(start(2, recipe, tmp_path / "out", "--resume"))
    finished(start(1, recipe, tmp_path / "whole"))
    assert_same_run(tmp_path / "out", tmp_path / "whole")


def children_of(parent: int) -> list[int]:
    """Process ids of the ranks that a launcher started."""
    return [int(word) for word in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
