"""Self-sampling: counts agree with scoring the text again, balance can be bought, files are read back."""

import json

import pytest
import torch

import aqtx.text.self_sampling as ebss
from aqtx.blockwise.block_writer import BlockRoutes
from aqtx.checkpoint.open import trace
from aqtx.errors import InputError
from aqtx.program.program import Program
from aqtx.runs.recipe import parse_recipe
from aqtx.text.calibration_spec import CalibrationSpec
from aqtx.text.expert_choices import Routed
from aqtx.text.sources import read_passages
from tests.tiny import OLMOE, random_model

LENGTH = ebss.SLOTS + 8  # the cache grows once


@pytest.fixture(scope="module")
def program() -> Program:
    return trace(random_model(dtype=torch.float32))


@pytest.fixture(scope="module")
def sampled(program) -> ebss.Sampled:
    return ebss.sample(Routed(program), num_sequences=10, length=LENGTH)


def test_usage_is_what_scoring_the_text_counts(program, sampled) -> None:
    assert sampled.ids.shape == (10, LENGTH)
    assert torch.equal(ebss.usage_of(program, sampled.ids), sampled.usage)
    assert sampled.usage.sum() == 10 * LENGTH * 2 * 2  # tokens, experts a token, layers


def test_a_model_that_does_not_fit_samples_the_same_text(program, sampled) -> None:
    blocks = ebss.sample(BlockRoutes(program), num_sequences=10, length=LENGTH)
    assert torch.equal(blocks.ids, sampled.ids) and torch.equal(blocks.usage, sampled.usage)


def test_seeds_decide(program, sampled) -> None:
    ids = [ebss.sample(Routed(program), num_sequences=3, length=12, seed=seed).ids for seed in (0, 0, 1)]
    assert torch.equal(ids[0], ids[1])
    assert not torch.equal(ids[0], ids[2])


def test_every_sequence_starts_from_a_token_of_its_own(sampled) -> None:
    assert len(sampled.ids[:, 0].unique()) == 10 > ebss.PARALLEL


def test_a_small_tau_balances_more(program) -> None:
    found = [ebss.sample(Routed(program), num_sequences=6, length=24, tau=tau).deviation for tau in (1e6, 1e-3)]
    assert found[1] < 0.6 * found[0]


def test_deviation_by_hand() -> None:
    usage = torch.tensor([[[3.0, 1.0], [2.0, 2.0]]])
    assert torch.allclose(ebss.deviation(usage), torch.tensor([0.125]))  # (std(.75, .25) + 0) / 2


def test_file_is_calibration_text(sampled, tmp_path, program) -> None:
    file = tmp_path / ebss.FILE_NAME
    sampled.write(file)
    rows = [list(passage.ids) for passage in read_passages(str(file), "calibration")]
    assert rows == sampled.ids.tolist()
    assert json.loads(file.read_text().splitlines()[0])["balance"]["deviation"] == pytest.approx(sampled.deviation)
    spec = CalibrationSpec(source="ebss", num_sequences=10, sequence_length=LENGTH)
    assert torch.equal(
        ebss.calibration(spec, 0, tmp_path, lambda: Routed(program)), sampled.ids
    )  # kept, not sampled again


def test_tau_is_a_key_of_the_source_ebss(program) -> None:
    recipe = {"version": 1, "model": {"source": "tinymoe"}}
    asked = {"source": "ebss", "num_sequences": 3, "sequence_length": 24}
    specs = [parse_recipe(recipe | {"calibration": asked | more}).calibration for more in ({}, {"tau": 1e-3})]
    published, balanced = (
        ebss.usage_of(program, ebss.calibration(spec, 0, None, lambda: Routed(program))) for spec in specs
    )
    assert ebss.deviation(balanced) < 0.8 * ebss.deviation(published)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"tau": 0.02}, "calibration: tau is of the source ebss, but the source is 'builtin': leave tau out"),
        ({"source": "ebss", "tau": 0}, "calibration: tau is 0.0, but must be above 0"),
        ({"source": "ebss", "tau": "low"}, "calibration.tau: expected a number or null, got 'low'"),
    ],
)
def test_a_tau_that_cannot_be_is_refused(values, words) -> None:
    with pytest.raises(InputError) as caught:
        parse_recipe({"version": 1, "model": {"source": "tinymoe"}, "calibration": values})
    assert caught.value.problems == [words]


def test_a_dense_model_is_refused() -> None:
    config = {key: value for key, value in OLMOE.items() if "expert" not in key} | {"model_type": "llama"}
    with pytest.raises(InputError, match="no experts to balance"):
        Routed(trace(random_model(config, dtype=torch.float32)))
