"""The `gptq` pass on a small model: sequential, independent of memory and of interruptions."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from aqtx.checkpoint.open import trace
from aqtx.errors import InputError
from aqtx.formats import quantize
from aqtx.passes.gptq import Gptq
from aqtx.program.program import Program
from aqtx.registry import Changes, Context
from tests.marks import slow
from tests.tiny import OLMOE, random_model, write_checkpoint

KEPT = ("router", "lm_head")


def prepare(source: object, format_name: str = "int3_g32") -> Program:
    program = trace(source)
    for site in program.sites():
        if site.category not in KEPT:
            site.set("format", "mxfp4" if site.expert == 2 else format_name)
    return program


def run(program: Program, ids: torch.Tensor, work: Path | None = None, **fields) -> Changes:
    context = Context(quiet=True, work=work, load_calibration=lambda: ids)
    return Gptq(**fields).run(program, context)


def codes(program: Program) -> dict[str, torch.Tensor]:
    return {name: code.dequantize() for name, code in program.codes.items()}


def assert_equal_codes(one: Program, other: Program) -> None:
    left, right = codes(one), codes(other)
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return random_model(dtype=torch.float32)


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    """A narrow vocabulary, so that inputs are correlated and some experts see little."""
    return torch.randint(0, 12, (8, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def reference(model, ids) -> tuple[Program, Changes]:
    program = prepare(model)
    return program, run(program, ids)


def test_every_planned_site_gets_codes_of_its_format(reference) -> None:
    program, changes = reference
    for site in program.sites():
        assert (site.name in program.codes) == (site.category not in KEPT)
        if site.name in program.codes:
            assert program.codes[site.name].format_name == site.get("format")
    assert set(changes.changed) == set(program.codes)


def test_report_has_a_row_for_every_matrix(reference, ids) -> None:
    rows = reference[1].details["sites"]
    assert len(rows) == len(reference[0].codes)
    assert all(row["error_after"] <= row["error_before"] for row in rows)
    assert (
        sum(row["tokens"] for row in rows if "layers.0.mlp.experts" in row["site"] and "gate_proj" in row["site"])
        == 2 * ids.numel()
    )
    assert all(row["damping"] == 0.01 for row in rows)
    assert reference[1].details["peak_memory_bytes"] > 0
    json.dumps(reference[1].details)


def test_logits_are_nearer_than_round_to_nearest(reference, model, ids) -> None:
    program, nearest = reference[0], prepare(model)
    for site in nearest.sites():
        if site.get("format"):
            nearest.codes[site.name] = quantize(nearest.read(site), site.get("format"))
    with torch.no_grad():
        truth, gptq, rtn = (one(ids) for one in (model, program.module(), nearest.module()))
    assert (gptq - truth).norm() < 0.7 * (rtn - truth).norm()


def test_sees_the_rounded_blocks_before(model, ids, reference) -> None:
    """Rounding the first layer to 2 bits changes the second layer's codes, unless original inputs are asked for."""
    rounded, original, plain = prepare(model), prepare(model), prepare(model)
    for program in (rounded, original):
        for site in program.sites():
            if site.layer == 0 and site.get("format"):
                site.set("format", "int2_g32")
    run(rounded, ids)
    run(original, ids, inputs="original")
    run(plain, ids, inputs="original")
    name = "model.layers.1.self_attn.q_proj"
    assert not torch.equal(rounded.codes[name].dequantize(), reference[0].codes[name].dequantize())
    assert torch.equal(original.codes[name].dequantize(), plain.codes[name].dequantize())


@pytest.mark.parametrize("fields", [{"stream": "disk"}, {"max_memory": 4_200_000, "stream": "disk"}])
def test_memory_does_not_change_a_bit(model, ids, reference, fields) -> None:
    program = prepare(model)
    run(program, ids, **fields)
    assert_equal_codes(program, reference[0])


def test_too_little_memory_is_refused(model, ids) -> None:
    with pytest.raises(InputError, match="raise max_memory"):
        run(prepare(model), ids, max_memory=1_000_000)


@pytest.mark.parametrize("weighting", ["score", "squared_score"])
def test_weighting_runs_and_counts_effective_tokens(model, ids, reference, weighting) -> None:
    rows = run(prepare(model), ids, weighting=weighting).details["sites"]
    plain = {row["site"]: row["tokens"] for row in reference[1].details["sites"]}
    experts = [row for row in rows if ".experts." in row["site"] and row["tokens"] > 1]
    assert all(row["tokens"] <= plain[row["site"]] * 1.01 for row in experts)
    assert any(row["tokens"] < plain[row["site"]] for row in experts)


def test_an_expert_without_tokens_is_rounded_to_nearest(model) -> None:
    program = prepare(model)
    changes = run(program, torch.full((1, 2), 3))  # one token twice reaches 2 of 4 experts
    starved = [row["site"] for row in changes.details["sites"] if row["tokens"] == 0]
    assert starved
    for site in program.sites():
        if site.name in starved:
            assert torch.equal(program.codes[site.name].qdata, quantize(program.read(site), site.get("format")).qdata)


def test_fields_are_checked() -> None:
    assert len(Gptq(damp_fraction=-1, block_size=0, max_memory=0).validate()) == 3


# A run in a process of its own, to be killed: python THIS_FILE checkpoint work
def child(checkpoint: str, work: str) -> None:
    torch.set_num_threads(1)
    program = prepare(checkpoint)
    run(program, torch.randint(0, 12, (8, 24), generator=torch.Generator().manual_seed(0)), Path(work))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), {**OLMOE, "num_hidden_layers": 4})


def records(work: Path) -> list[Path]:
    return sorted(work.glob("gptq-*/block-*.json"))


@pytest.mark.parametrize("after", [1, *slow(3)])
def test_killed_and_resumed_gives_the_same_bytes(checkpoint, ids, tmp_path, after) -> None:
    unbroken = prepare(checkpoint)
    run(unbroken, ids)
    work = tmp_path / "work"
    work.mkdir()
    process = subprocess.Popen(
        [sys.executable, __file__, str(checkpoint), str(work)], env={**os.environ, "PYTHONPATH": "."}
    )
    while process.poll() is None and len(records(work)) < after:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = len(records(work))
    assert done >= after
    ages = {file: file.stat().st_mtime_ns for file in records(work)}
    resumed = prepare(checkpoint)
    changes = run(resumed, ids, work)
    assert all(file.stat().st_mtime_ns == age for file, age in ages.items())  # finished blocks were not done again
    assert_equal_codes(resumed, unbroken)
    assert len(changes.details["sites"]) == len(unbroken.codes)


def test_damaged_resume_data_is_named(checkpoint, ids, tmp_path) -> None:
    run(prepare(checkpoint), ids, tmp_path)
    record = records(tmp_path)[1]
    intact = record.read_text()
    record.write_text(intact.replace("tokens", "takens", 1))
    with pytest.raises(InputError, match=record.name):
        run(prepare(checkpoint), ids, tmp_path)
    record.write_text(intact)
    code = next((tmp_path / "codes").glob("*layers.0*.safetensors"))
    data = bytearray(code.read_bytes())
    data[-1] ^= 1
    code.write_bytes(data)
    with pytest.raises(InputError, match=code.name):
        run(prepare(checkpoint), ids, tmp_path)


if __name__ == "__main__":
    child(*sys.argv[1:])


@pytest.mark.parametrize(
    ("value", "inputs"),
    [
        (float("nan"), "rounded"),
        (float("inf"), "original"),
        *slow((float("nan"), "original"), (float("inf"), "rounded")),
    ],
)
def test_a_weight_that_is_not_finite_is_named(ids, value: float, inputs: str) -> None:
    for wanted in ("model.layers.0.self_attn.o_proj", "model.layers.0.mlp.experts.1.up_proj"):
        source = random_model(dtype=torch.float32)
        by_name = dict(source.named_parameters())
        own = f"{wanted}.weight"
        stack = by_name[own] if own in by_name else by_name["model.layers.0.mlp.experts.up_proj"][1]
        with torch.no_grad():
            stack[2, 5] = value
        program = prepare(source)
        with pytest.raises(InputError, match=rf"{wanted}: the weight has {value} at index \[2, 5\]"):
            run(program, ids, inputs=inputs)
        assert not any(code.dequantize().isnan().any() for code in program.codes.values())
