"""What belongs to a model beside its weights travels into the checkpoint and every export of it."""

import json
import shutil
from pathlib import Path

import pytest
from gguf import GGUFReader
from transformers import AutoConfig, AutoTokenizer

import aqtx
from aqtx.checkpoint.exports.run import export
from aqtx.checkpoint.locate import shipped
from aqtx.models import load_config
from aqtx.models.config_text import config_text
from tests.quantized_folders import quantized

TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
BESIDE = {
    "chat_template.jinja": TEMPLATE,
    "additional_chat_templates/tool_use.jinja": TEMPLATE + "<tools>",
    "generation_config.json": '{"eos_token_id": [0, 1], "temperature": 0.6}\n',
    "special_tokens_map.json": '{"eos_token": "<|endoftext|>"}\n',
    "added_tokens.json": "{}\n",
}
NOT_OURS = ("notes.txt", "tokenizer/notes.txt")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "model"
    shutil.copytree(shipped()["tinymoe"], folder)
    for name, text in {**BESIDE, **dict.fromkeys(NOT_OURS, "x")}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture(scope="module")
def rounded(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized(
        source, tmp_path_factory.mktemp("rounded") / "q", {"*.experts.*": "int4_g32", "*_proj": "int4_g32"}
    )


def assert_passed_on(source: Path, folder: Path) -> None:
    for name in (*BESIDE, "tokenizer.json", "tokenizer_config.json"):
        assert (folder / name).read_bytes() == (source / name).read_bytes(), name
    assert not [name for name in NOT_OURS if (folder / name).exists()]


def test_the_checkpoint_has_them_and_its_checksums_too(source: Path, rounded: Path) -> None:
    assert_passed_on(source, rounded)
    assert all(name in (rounded / "checksums.json").read_text() for name in BESIDE)
    aqtx.load(rounded, verify=True)


@pytest.mark.parametrize("to", ["dequantized", "compressed-tensors", "torchao"])
def test_exported_folders_have_them(to: str, source: Path, rounded: Path, tmp_path: Path) -> None:
    export(rounded, to, tmp_path / "out")
    assert_passed_on(source, tmp_path / "out")


def test_files_of_code_that_stay_behind_are_named_nowhere(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "code")
    for name in ("config.json", "tokenizer_config.json"):
        told = json.loads((tmp_path / "code" / name).read_text())
        (tmp_path / "code" / name).write_text(json.dumps({**told, "auto_map": {"AutoTokenizer": ["code.X", None]}}))
    (tmp_path / "code" / "code.py").write_text("raise SystemExit('run')")
    folder = aqtx.save(aqtx.trace(tmp_path / "code"), tmp_path / "saved")
    for name in ("config.json", "tokenizer_config.json"):
        assert "auto_map" not in json.loads((folder / name).read_text())
    AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


@pytest.mark.parametrize("kind", ["mamba2", "nemotron_h"])
def test_infinity_in_a_config_is_read_and_written_as_transformers_does(kind: str, tmp_path: Path) -> None:
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    assert '"__float__": "Infinity"' in (tmp_path / "config.json").read_text()
    config = load_config(tmp_path)
    assert config["time_step_limit"] == [0.0, float("inf")]
    (tmp_path / "config.json").write_text(config_text({**config, "low": float("-inf"), "none": float("nan")}))
    again = AutoConfig.from_pretrained(tmp_path)
    assert list(again.time_step_limit) == [0.0, float("inf")]
    assert again.low == float("-inf") and again.none != again.none
    json.loads((tmp_path / "config.json").read_text(), parse_constant=pytest.fail)


def test_a_gguf_file_tells_its_chat_template(rounded: Path, tmp_path: Path) -> None:
    export(rounded, "gguf", tmp_path / "out.gguf")
    fields = GGUFReader(tmp_path / "out.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == TEMPLATE
    assert len(fields["tokenizer.ggml.tokens"].contents()) > 0
