"""Memory is promised before a run: how the limit is spelt, the table, what cannot fit, the estimate against reality."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import aqtx
from aqtx import cli
from aqtx.blockwise.work_size import copied_bytes, parameter_bytes
from aqtx.checkpoint.open import trace
from aqtx.errors import InputError
from aqtx.machine.memory import bytes_of, resident_bytes
from aqtx.passes.assign_plan import AssignPlan
from aqtx.passes.emit import Emit
from aqtx.passes.quantize import Quantize
from aqtx.runs.memory_needs import Sizes, needs, pass_need, text_needs
from aqtx.runs.opening import program_of
from aqtx.runs.recipe import load_recipe
from tests.tiny import OLMOE, write_checkpoint


@pytest.mark.parametrize(
    ("text", "number"),
    [("8GiB", 8 << 30), ("500 MB", 500_000_000), ("1.5gb", 1_500_000_000), ("2KiB", 2048), ("12", 12), ("7B", 7)],
)
def test_sizes_are_read(text: str, number: int) -> None:
    assert bytes_of(text) == number
    assert load_recipe("quickstart", {"max_memory": text}).memory_limit == number


@pytest.mark.parametrize("value", ["much", "8 GiBs", "-3GB", 0, -5])
def test_what_is_no_size_is_told(value: object) -> None:
    with pytest.raises(InputError, match=r"^max_memory: "):
        load_recipe("quickstart", {"max_memory": value})


def test_the_limit_decides_no_result() -> None:
    """So it stands in no resolved recipe, and a run goes on under another one."""
    limited, free = load_recipe("quickstart", {"max_memory": "4GB"}), load_recipe("quickstart")
    assert limited.resolved() == free.resolved()


def test_check_prints_what_each_stage_takes(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", "quickstart", "max_memory=3GB"]) == 0
    told = capsys.readouterr().out
    rows = [line.split("  ")[0] for line in told.splitlines()]
    stages = ["evaluate before", "annotate_alpha", "assign_plan", "gptq", "emit", "evaluate after"]
    assert [row for row in rows if row in stages] == stages
    assert "one block at a time" in told


def test_training_streams_where_the_model_does_not_fit(tmp_path: Path) -> None:
    """Four layers in the shapes of OLMoE-1B-7B, 3.8 GB, by their config alone."""
    published = Path(__file__).parents[1] / "benchmarks" / "configs" / "OLMoE-1B-7B" / "config.json"
    config = json.loads(published.read_text()) | {"num_hidden_layers": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    recipe = load_recipe("router_only", {"model.source": str(tmp_path)})
    program, step = program_of(recipe, config_only=True), recipe.passes[3]
    whole, blocks, kept = (pass_need(Sizes(program, 0, room), step, recipe) for room in (20 << 30, 3 << 30, 1 << 30))
    assert (whole.streams, blocks.streams, kept.streams) == ("no", *["one block at a time"] * 2)
    assert whole.peak > 3_700_000_000 and blocks.peak < 3 << 30
    assert (whole.disk, blocks.disk) == (0, 0)
    assert kept.disk == 128 * 256 * 2 * (2048 + 4 * 64)  # what flows into the head, and router logits
    for source, walks in (("self", 256), ("ebss", 16 * 256)):
        asked = load_recipe("router_only", {"model.source": str(tmp_path), "calibration.source": source})
        [whole], [blocks] = (text_needs(Sizes(program, 0, room), asked) for room in (20 << 30, 3 << 30))
        assert whole.streams == "no" and whole.peak > 3_700_000_000 > 3 << 30 > blocks.peak
        assert blocks.streams.startswith(f"one block at a time: {walks:,} walks over 3.8 GB, ")


@pytest.mark.parametrize("command", ["check", "apply"])
def test_what_cannot_fit_is_one_sentence(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "run"
    assert cli.main([command, "quickstart", "max_memory=50MB", f"output={output}"]) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if "max_memory" in line]
    assert "0.05 GB may be taken; the nearest setting that does is max_memory=" in line
    assert not output.exists()
    nearest = line.rsplit("max_memory=", 1)[1]
    limit = load_recipe("quickstart", {"max_memory": nearest}).memory_limit
    assert limit is not None  # what this process holds counts, and it has grown since
    assert cli.main(["check", "quickstart", f"max_memory={2 * limit}"]) == 0


CHILD = """
import json, sys, threading, time
import torch
from aqtx.machine.memory import resident_bytes
from aqtx.registry import Pass
from aqtx.runs import apply
from aqtx.runs.recipe import load_recipe

torch.set_num_threads(1)
peaks, now, told = {}, {"stage": ""}, []

def watch():
    while True:
        peaks[now["stage"]] = max(peaks.get(now["stage"], 0), resident_bytes())
        time.sleep(0.005)

run = Pass.run

def named(self, *arguments):
    now["stage"] = self.name
    found = run(self, *arguments)
    now["stage"] = ""
    return found

Pass.run = named
threading.Thread(target=watch, daemon=True).start()
apply.apply_recipe(load_recipe("quickstart", json.loads(sys.argv[1])), quiet=True, tell=told.extend)
peaks["all"] = max(peaks.values())
told = {need.stage: need.peak for need in told}
print(json.dumps([told | {"all": max(told.values())}, peaks]))
"""


@pytest.mark.slow
def test_the_estimate_is_near_what_is_measured(tmp_path: Path) -> None:
    """In a process of its own, where nothing else has taken memory; stages long enough to be sampled."""
    settings = {"output": str(tmp_path / "run"), "report": False, "calibration.num_sequences": 16}
    settings |= {"evaluate.max_tokens": 4000}
    command = [sys.executable, "-c", CHILD, json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    estimated, measured = json.loads(done.stdout.splitlines()[-1])
    stages = ("annotate_alpha", "assign_plan", "gptq", "all")
    off = {stage: round(estimated[stage] / measured[stage], 2) for stage in stages}
    assert {stage for stage, ratio in off.items() if not 0.7 <= ratio <= 1.3} == set(), off


def test_packed_and_mapped_weights_count_as_they_lie(tmp_path: Path) -> None:
    """A quantized folder takes its packed size; of a plain one only stacks and what is converted are copied."""
    source = write_checkpoint(tmp_path / "source", OLMOE | {"dtype": "bfloat16"})
    program = trace(source)
    specs = program.weights.specs
    stacks = sum(2 * spec.numel for spec in specs.values() if len(spec.shape) == 3)
    assert copied_bytes(program, specs) == stacks
    converted = trace(source, torch.float16)
    assert copied_bytes(converted, specs) == parameter_bytes(converted, specs)
    aqtx.run(program, [AssignPlan(method="uniform", candidates=("mxfp4",), keep=("lm_head",)), Quantize(), Emit()])
    aqtx.save(program, tmp_path / "packed")
    loaded = aqtx.load(tmp_path / "packed")
    packed = parameter_bytes(program, specs)
    assert parameter_bytes(loaded, specs) == packed < 0.6 * parameter_bytes(trace(source), specs)
    name = next(name for name, spec in specs.items() if len(spec.shape) == 3)
    loaded.weights.put(name, torch.zeros(specs[name].shape, dtype=torch.bfloat16))  # codes no more
    assert parameter_bytes(loaded, [name]) == 2 * specs[name].numel


def test_a_wide_head_counts_only_for_passes_that_work_on_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(OLMOE | {"vocab_size": 50_000}))
    told = {}
    for keep in (["attention", "router", "lm_head"], ["attention", "router"]):
        recipe = load_recipe("quickstart", {"model.source": str(tmp_path), "passes.1.assign_plan.keep": keep})
        program = program_of(recipe, config_only=True)
        told["lm_head" in keep] = {need.stage: need.peak - resident_bytes() for need in needs(recipe, program)}
    shapes = {site.category: site.shape for site in program.sites()}
    head, expert = (rows * columns for rows, columns in (shapes["lm_head"], shapes["mlp_down"]))
    more = {stage: (told[False][stage] - told[True][stage]) / 4 for stage in told[True]}
    noise = 1 << 20  # of what the process holds
    assert abs(more["annotate_alpha"]) <= noise
    assert more["assign_plan"] == pytest.approx(8 * (head - expert), abs=noise)
    assert more["gptq"] == pytest.approx(14 * (head - expert), rel=0.05)
