"""The table: names, canonical forms, sizes, and what a wrong name says."""

import subprocess
import sys

import pytest

from aqtx.errors import InputError
from aqtx.formats import names, parse
from aqtx.formats.table import describe, expand
from aqtx.planning.settings import Settings

BITS = {
    "mxfp4": 4.25, "mxfp6": 6.25, "mxfp6_e3m2": 6.25, "mxfp8": 8.25, "mxfp8_e5m2": 8.25, "bf16": 16,
    "int2": 2.125, "int3": 3.125, "int3_asym": 3.1875, "int4_g32": 4.5, "int5_g32_asym": 5.75, "int4": 4.125,
    "int4_g64_asym": 4.375, "q2_k": 2.625, "q3_k": 3.4375, "q4_k": 4.5, "q5_k": 5.5, "q6_k": 6.5625,
    "int8": 8.125, "int8_row": 8 + 16 / 2048, "fp4": 4.125, "fp6": 6.125, "fp8_g32": 8.5,
}  # fmt: skip


@pytest.mark.parametrize("name", BITS)
def test_bits_of_a_square_weight(name: str) -> None:
    assert parse(name).bits((2048, 2048)) == BITS[name]


def test_nvfp4_has_one_fp32_per_matrix() -> None:
    assert parse("nvfp4").num_bytes((3, 64, 128)) == 3 * (64 * (64 + 8) + 4)


@pytest.mark.parametrize(
    ("name", "shape", "size"),
    [
        ("mxfp4", (2, 33), 2 * (17 + 2)),  # an odd column and a second block
        ("int3", (1, 100), 38 + 2),  # 300 bits end on a byte; a group is at most the row
        ("int3_asym", (1, 100), 38 + 2 + 1),
        ("int4_g64", (5, 130), 5 * (65 + 3 * 2)),
        ("mxfp6", (1, 8), 6 + 1),
        ("bf16", (2, 3), 12),
    ],
)
def test_bytes_of_ragged_rows(name: str, shape: tuple[int, ...], size: int) -> None:
    assert parse(name).num_bytes(shape) == size


@pytest.mark.parametrize(
    ("written", "canonical"),
    [
        ("MXFP6", "mxfp6_e2m3"), ("mxfp8", "mxfp8_e4m3"), ("fp6", "fp6_e2m3"), ("fp8@amax", "fp8_e4m3"),
        ("int4_g128", "int4"), ("int4_g64_asym@search", "int4_g64_asym"), ("int2@search", "int2"),
        ("int4_g64@amax", "int4_g64@amax"), ("mxfp4_g32@floor", "mxfp4"), ("mxfp4@even", "mxfp4@even"),
        ("int8_row_asym", "int8_row_asym"),
    ],
)  # fmt: skip
def test_canonical_names(written: str, canonical: str) -> None:
    assert parse(written).name == canonical
    assert parse(canonical) == parse(written)


def test_scale_rule_overrides_the_name() -> None:
    assert parse("mxfp4@even", scale_rule="rceil").rule == "rceil"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("mxpf4", "did you mean 'mxfp4'"), ("int7", "unknown format"), ("int4_g48", "must be one of 32, 64, 128"),
        ("mxfp4_g64", "fixed at 32"), ("mxfp4_row", "fixed at 32"), ("mxfp4@evn", "did you mean 'even'"),
        ("fp4_asym", "only integer formats"), ("", "unknown format"),
    ],
)  # fmt: skip
def test_wrong_names(name: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        parse(name)


def test_every_row_is_described() -> None:
    assert [row["format"] for row in describe()] == names()
    rules = {row["format"]: row["rule"] for row in describe()}
    assert (rules["int4"], rules["int8"], rules["mxfp4"], rules["nvfp4"]) == ("search", "amax", "floor", "amax")


def test_names_are_checked_without_torch() -> None:
    code = "import sys, aqtx.formats as f; f.parse('int4_g64@search'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_sets_stand_for_several_formats_each_once() -> None:
    assert expand(["mx", "mxfp4", "int8"]) == ("mxfp4", "mxfp6_e2m3", "mxfp8_e4m3", "int8")
    assert {*expand(["mx"]), *expand(["int"]), "nvfp4"} == set(expand(["all"]))
    assert all(parse(name).name == name for name in expand(["all", "k", "groups"]))
    settings = Settings(method="error", candidates=("int", "nvfp4"), average_bits=4.25)
    assert settings.problems() == []
    assert [fmt.name for fmt in settings.formats] == ["int3_g64", "int4_g64", "nvfp4", "int6_g64", "int8_g64"]
    assert any("unknown format 'mix'" in problem for problem in Settings(candidates=("mix",)).problems())
