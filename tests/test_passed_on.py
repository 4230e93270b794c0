"""What belongs to a model beside its weights travels into the checkpoint and every export of it."""

import shutil
from pathlib import Path

import pytest
from gguf import GGUFReader

import aqtx
from aqtx.checkpoint.exports.run import export
from aqtx.checkpoint.locate import shipped
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


def test_a_gguf_file_tells_its_chat_template(rounded: Path, tmp_path: Path) -> None:
    export(rounded, "gguf", tmp_path / "out.gguf")
    fields = GGUFReader(tmp_path / "out.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == TEMPLATE
    assert len(fields["tokenizer.ggml.tokens"].contents()) > 0
