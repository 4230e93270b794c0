"""The quick verdict on alpha: rank correlations with their intervals, and what is told of them."""

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

import aqtx
from aqtx import cli
from aqtx.errors import InputError
from aqtx.numerics.intervals import Interval, rank_correlation
from aqtx.passes.annotate_alpha import AnnotateAlpha
from aqtx.planning.settings import Settings
from aqtx.registry import Context
from aqtx.study.quick import Quick, quick_verdict
from tests.tiny import write_checkpoint


def test_the_correlation_is_spearmans_with_ties() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 6, 40).astype(float), rng.integers(0, 6, 40).astype(float)
    found = rank_correlation(x, y)
    assert found.value == pytest.approx(float(spearmanr(x, y)[0]))
    assert found.low is not None and found.high is not None and found.low < found.value < found.high
    assert rank_correlation(x, 3 * x + 1).value == pytest.approx(1.0)


def test_the_interval_is_as_wide_as_the_samples_say() -> None:
    """Pairs drawn again and again from one distribution: the interval tells the spread of their correlations."""
    rng = np.random.default_rng(1)
    draws = rng.normal(size=(400, 2, 100))
    draws[:, 1] += draws[:, 0]
    found = [rank_correlation(*draw) for draw in draws[:20]]
    values = [float(spearmanr(*draw)[0]) for draw in draws]
    width = np.mean([one.high - one.low for one in found if one.low is not None and one.high is not None])
    assert width == pytest.approx(2 * 1.96 * np.std(values), rel=0.25)


@pytest.mark.parametrize("pairs", [([1.0, 2.0], [2.0, 1.0]), ([1.0, 1.0, 1.0], [1.0, 2.0, 3.0])])
def test_what_cannot_be_ranked_is_told(pairs: tuple[list[float], list[float]]) -> None:
    with pytest.raises(InputError, match="cannot be ranked"):
        rank_correlation(*map(np.array, pairs))


def test_it_annotates_no_sensitivity(tmp_path: Path) -> None:
    program, context = aqtx.trace(write_checkpoint(tmp_path / "model")), Context(quiet=True)
    AnnotateAlpha().run(program, context)
    found = quick_verdict(program, Settings(candidates=("mxfp4", "int3"), average_bits=4.0), context, [])
    assert (found.format, found.num_sites) == ("int3", 24) and -1 <= found.plan.value <= 1
    assert found.halves > 0.3, "halves of one text agree on what it says"
    assert all(site.get("fisher") is None for site in program.sites())
    again = quick_verdict(program, Settings(candidates=("mxfp4", "int3"), average_bits=4.0), context, [])
    assert again.plan == found.plan
    with pytest.raises(InputError, match="0 of the planned matrices have an alpha"):
        quick_verdict(aqtx.trace(program.folder or ""), Settings(average_bits=4.5), context, [])


@pytest.mark.parametrize(
    ("low", "high", "told"),
    [
        (0.6, 0.8, "much as the model"),
        (-0.6, -0.1, "the wrong way"),
        (-0.1, 0.3, "not to be"),
        (0.3, 0.7, "leaves open"),
    ],
)
def test_the_verdict_follows_the_interval(low: float, high: float, told: str) -> None:
    found = Interval((low + high) / 2, low, high)
    assert told in Quick(found, found, found, 0.9, 192, "int2", 1.0).sentence


def test_it_is_one_option_of_the_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_checkpoint(tmp_path / "model")
    assert cli.main(["study", "study", "--quick", f"model.source={source}", f"output={tmp_path / 'out'}"]) == 0
    printed = capsys.readouterr().out
    assert "Plans by alpha rank 24 matrices in int2" in printed and "aqtx study study" in printed
    assert [file.name for file in tmp_path.iterdir()] == ["model"], "nothing is written"
