"""The table of families: what it says is what the code goes by, and models/README.md shows the same."""

import re
from pathlib import Path

import pytest
import torch

from aqtx import cli
from aqtx.checkpoint.exports.run import export
from aqtx.commands.families import HEADERS, ROTATIONS, family_rows, markdown_table
from aqtx.errors import InputError
from aqtx.models import MODEL_TYPES
from tests.model_cases import CASES, oracle
from tests.quantized_folders import quantized
from tests.test_families import FAMILIES

README = Path(__file__).parents[1] / "models" / "README.md"


def test_the_readme_shows_the_table() -> None:
    assert markdown_table() in README.read_text(encoding="utf-8")


def test_ls_models_prints_a_row_a_family(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ls", "models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    header = next(index for index, line in enumerate(lines) if line.startswith("model_type"))
    assert re.split(r"  +", lines[header].strip()) == list(HEADERS)
    found = [line.split()[0] for line in lines[header + 1 :] if line.split()[:1] and line.split()[0] in MODEL_TYPES]
    assert found == list(MODEL_TYPES)


def test_tests_cover_the_rotations_that_the_table_names() -> None:
    from tests.test_families import ROTATIONS as tested

    assert set(tested) == set(ROTATIONS)


@pytest.mark.parametrize(
    "name", ["granitemoe", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3-moe", "gpt-oss"))]
)
def test_an_export_works_where_the_table_says_so(name: str, tmp_path: Path) -> None:
    """Beside GGUF, which needs a tokenizer: it is refused for the family or for that."""
    assert name in FAMILIES
    row = dict(zip(HEADERS, next(row for row in family_rows() if row[0] == CASES[name][0]), strict=True))
    oracle(name).to(torch.bfloat16).save_pretrained(tmp_path / "source")
    quantized(tmp_path / "source", tmp_path / "saved", {"*.experts.*": "int8_row", "*.self_attn.?_proj": "int8_row"})
    for to in ("dequantized", "compressed-tensors", "torchao"):
        if to in row["exports"].split(", "):
            export(tmp_path / "saved", to, tmp_path / to)
        else:
            with pytest.raises(InputError, match="has no form"):
                export(tmp_path / "saved", to, tmp_path / to)
    with pytest.raises(InputError) as refused:
        export(tmp_path / "saved", "gguf", tmp_path / "out.gguf")
    assert ("writes no GGUF of model_type" in str(refused.value)) == ("gguf" not in row["exports"])
