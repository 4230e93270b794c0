"""Self-sampling: counts agree with scoring the text again, balance can be bought, files are read back."""

import json

import pytest
import torch

import aqtx.ebss as ebss
from aqtx.errors import InputError
from aqtx.program import Program
from aqtx.text_sources import read_passages
from aqtx.tracing import trace
from tests.tiny import OLMOE, random_model


@pytest.fixture(scope="module")
def program() -> Program:
    return trace(random_model(dtype=torch.float32))


@pytest.fixture(scope="module")
def sampled(program) -> ebss.Sampled:
    return ebss.sample(program, num_sequences=6, length=12)


def test_usage_is_what_scoring_the_text_counts(program, sampled) -> None:
    assert sampled.ids.shape == (6, 12)
    assert torch.equal(ebss.usage_of(program, sampled.ids), sampled.usage)
    assert sampled.usage.sum() == 6 * 12 * 2 * 2  # tokens, experts a token, layers


def test_seeds_decide(program, sampled) -> None:
    assert torch.equal(ebss.sample(program, num_sequences=6, length=12).ids, sampled.ids)
    assert not torch.equal(ebss.sample(program, num_sequences=6, length=12, seed=1).ids, sampled.ids)


def test_a_small_tau_balances_more(program) -> None:
    found = [ebss.sample(program, num_sequences=6, length=24, tau=tau).deviation for tau in (1e6, 1e-3)]
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
    assert torch.equal(ebss.calibration(program, 6, 12, 0, tmp_path), sampled.ids)  # kept, not sampled again


def test_a_dense_model_is_refused() -> None:
    config = {key: value for key, value in OLMOE.items() if "expert" not in key} | {"model_type": "llama"}
    with pytest.raises(InputError, match="no experts to balance"):
        ebss.sample(trace(random_model(config, dtype=torch.float32)), num_sequences=1, length=4)
