"""A whole run on the shipped model: reproducible bytes, truthful counts, resumable, nothing overwritten by accident."""

import json

import pytest
import torch

import aqtx
from aqtx.errors import InputError
from aqtx.registry import PASSES
from aqtx.runs.directory import CHECKSUMS

RECIPE = {
    "version": 1,
    "model": {"source": "tinymoe"},
    "calibration": {"num_sequences": 8, "sequence_length": 128},
    "passes": [
        {"annotate_alpha": {"raw": False}},
        {"assign_plan": {"average_bits": 4.5, "candidates": ["mxfp4", "int4", "mxfp6"]}},
        {"gptq": {}},
        "emit",
    ],
    "evaluate": {"perplexity": "builtin", "max_tokens": 1500},
    "report": False,
}
EXACT = (".safetensors", "plan.json", "alpha.csv", "config.json", "recipe.yaml", "index.json")


def sums(directory):
    """Checksums of the files that equal recipes must reproduce."""
    found = json.loads((directory / CHECKSUMS).read_text())
    return {name: digest for name, digest in found.items() if name.endswith(EXACT)}


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    return aqtx.apply(RECIPE, output=str(tmp_path_factory.mktemp("first") / "run"))


def test_two_runs_of_one_recipe_give_the_same_bytes(first, tmp_path):
    second = aqtx.apply(RECIPE, output=str(tmp_path / "run"))
    assert len(sums(first.directory)) >= 6
    assert sums(first.directory) == sums(second.directory)


def test_counts_add_up_and_agree_with_the_file(first):
    data = first.data
    for counts in (data["weights"], data["sites"]):
        assert counts["quantized"] + counts["kept"] + counts["refused"] == counts["total"]
    index = json.loads((first.directory / "model.safetensors.index.json").read_text())
    assert data["bytes"]["after"] == index["metadata"]["total_size"]
    assert data["average_bits_model"] == data["bytes"]["after"] * 8 / data["weights"]["total"]
    assert data["average_bits"] <= 4.5
    assert data["average_bits"] == json.loads((first.directory / "plan.json").read_text())["average_bits"]


def test_report_has_the_promised_keys(first):
    data = json.loads((first.directory / "report.json").read_text())
    promised = {"weights", "sites", "average_bits", "average_bits_model", "bytes", "perplexity", "passes"}
    assert promised | {"peak_memory_bytes", "seconds", "versions"} <= data.keys()
    assert {"before", "after", "change"} <= data["perplexity"].keys()
    assert all({"name", "seconds", "changed", "refused", "max_difference"} <= row.keys() for row in data["passes"])


def run_until(name: str, output, *, resume: bool = False) -> None:
    """The recipe up to a pass, which is interrupted as it begins."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PASSES[name], "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            aqtx.apply(RECIPE, output=str(output), resume=resume)


def test_a_run_broken_after_any_pass_resumes_to_the_same_bytes(first, tmp_path):
    output = tmp_path / "run"
    for name in ("assign_plan", "gptq", "emit"):
        run_until(name, output, resume=name != "assign_plan")
        assert not output.exists()
    resumed = aqtx.apply(RECIPE, output=str(output), resume=True)
    assert sums(resumed.directory) == sums(first.directory)
    assert [row["name"] for row in resumed.data["passes"]] == ["annotate_alpha", "assign_plan", "gptq", "emit"]


def test_damaged_resume_data_is_named(tmp_path):
    output = tmp_path / "run"
    run_until("emit", output)
    damaged = next((tmp_path / "run.partial" / "work" / "codes").glob("*experts.3.up_proj*"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x55")
    with pytest.raises(InputError, match=rf"{damaged.name}: resume data is missing or damaged"):
        aqtx.apply(RECIPE, output=str(output), resume=True)


def test_resume_of_a_complete_run_returns_it(first):
    again = aqtx.apply(RECIPE, output=str(first.directory), resume=True)
    assert again.data == first.data


def test_resume_with_another_recipe_names_the_difference(tmp_path):
    output = tmp_path / "run"
    run_until("annotate_alpha", output)
    with pytest.raises(InputError, match=r"average_bits was 4\.5 and is now 5"):
        aqtx.apply(RECIPE, output=str(output), resume=True, passes__1__assign_plan__average_bits=5)


def test_a_budget_that_cannot_be_met_says_the_smallest_possible(tmp_path):
    with pytest.raises(InputError, match=r"smallest possible, 4\.125"):
        aqtx.apply(RECIPE, output=str(tmp_path / "run"), passes__1__assign_plan__average_bits=2.0)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow  # the README's example compiles the same model in the default tests
def test_loaded_model_compiles_and_agrees_with_eager(first):
    """In float32, where no rounding is large enough to change a token's experts."""
    module = aqtx.trace(first.directory, torch.float32).module()
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    ids = torch.randint(0, 3072, (2, 24), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        for batch in (ids, ids[:, :7]):
            eager, fast = module(batch), compiled(batch)
            # Sums of up to 256 terms in another order differ by about sqrt(256) roundings of 2^-24 each; about 10
            # products in each of 4 blocks add up as a random walk; doubled for a bound.
            assert (eager - fast).abs().max() <= 2 * 256**0.5 * 40**0.5 * 2**-24 * eager.abs().max()
