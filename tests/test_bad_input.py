"""What would never end, what computes nothing, names that cannot be drawn, full disks: one sentence each."""

import gzip
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import aqtx
from aqtx.errors import InputError
from aqtx.machine.files import writing
from aqtx.models.sanity import nonsense
from aqtx.planning.manual import read_manual
from aqtx.program.edits import edit_from_json
from aqtx.report.write import write_report
from aqtx.runs.yaml_text import parse_yaml
from aqtx.text import sources
from aqtx.text.sources import read_passages
from tests.tiny import write_checkpoint


@pytest.mark.parametrize(
    "line", ['{"ids": [null]}', '{"ids": [-1]}', '{"ids": [1.5]}', '{"text": "\\ud800"}', "[" * 9000]
)
def test_a_line_that_is_no_passage_is_told_with_its_number(tmp_path, line):
    file = tmp_path / "text.jsonl"
    file.write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(InputError, match=r"text\.jsonl, line 2"):
        read_passages(str(file), "calibration")


def test_what_would_never_end_is_told(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(InputError, match=r"pipe\.txt.* no file"):
        read_passages(str(tmp_path / "pipe.txt"), "calibration")
    with pytest.raises(InputError, match=r"pipe\.txt.* no file"):
        read_manual(str(tmp_path / "pipe.txt"), ["a"])
    monkeypatch.setattr(sources, "_MOST_TEXT", 1000)
    for name in ("bomb.txt.gz", "bomb.jsonl.gz"):
        (tmp_path / name).write_bytes(gzip.compress(b" " * 5000))
        with pytest.raises(InputError, match=r"holds more than 1,000 characters"):
            read_passages(str(tmp_path / name), "calibration")
    bomb = "a0: &a0 [x]\n" + "".join(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(9))
    with pytest.raises(InputError, match="more than 20 aliases"):
        parse_yaml(bomb, "recipe")
    with pytest.raises(InputError, match="block cannot be"):
        edit_from_json({"edit": "hadamard", "weight": "w", "block": 10**12, "seed": None})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("rms_norm_eps", value) for value in (-1, 0, float("nan"), float("inf"), "x", True)),
        *(("rope_theta", value) for value in (0, -5, "x")),
        *(("max_position_embeddings", value) for value in (0, -1, 2.5, "x", [1])),
        ("num_experts_per_tok", 9),
    ],
)
def test_values_with_which_nothing_is_computed_are_told_by_key(key, value):
    config = {"rms_norm_eps": 1e-5, "rope_theta": 1e4, "max_position_embeddings": 64, "num_experts": 8}
    config["num_experts_per_tok"] = 2
    assert nonsense(config) == []
    [problem] = nonsense({**config, key: value})
    assert key in problem


def test_an_empty_text_source_is_told():
    with pytest.raises(InputError, match="names nothing"):
        read_passages("", "calibration")


def test_a_full_disk_names_the_file_and_the_bytes():
    with (
        pytest.raises(InputError, match=r"/dev/full cannot be written: the disk is full; 1,000,000 bytes are needed"),
        writing(Path("/dev/full"), 1_000_000),
        Path("/dev/full").open("wb", buffering=0) as stream,
    ):
        stream.write(b"x" * 1_000_000)


def test_names_with_dollars_and_half_pairs_are_drawn(tmp_path):
    change = {"value": 0.1, "low": 0.0, "high": 0.2}
    names = ("a$b$^{", "$", "\ud800", "\x1b[2J")
    entry = {"before": change, "after": change, "change": change}
    report = {"name": "$\\frac{", "perplexity": entry, "perplexity_by_domain": dict.fromkeys(names, entry)}
    (tmp_path / "report.json").write_text(json.dumps(report))
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert (tmp_path / "figures" / "perplexity_change.png").is_file()
    assert "\\ud800" in page
    assert "\x1b" not in page


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.uint8, torch.bool])
@pytest.mark.parametrize("key", ["model.layers.0.self_attn.q_proj.weight", "model.norm.weight"])
def test_weights_of_whole_numbers_are_told(tmp_path, key, dtype):
    folder = write_checkpoint(tmp_path / "source")
    shape = load_file(folder / "model.safetensors")[key].shape
    write_checkpoint(folder, **{key: torch.ones(shape).to(dtype)})
    with pytest.raises(InputError, match=rf"{key} is stored as .*, and a weight must be one of"):
        aqtx.trace(folder)


def test_weights_of_whole_numbers_in_a_family_of_transformers(tmp_path):
    small = {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 16, "vocab_size": 32, "rotary_dim": 8}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("gptj", **small)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    key = "transformer.h.0.mlp.fc_in.weight"
    save_file({**tensors, key: tensors[key].to(torch.int32)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=f"{key} is stored as I32"):
        aqtx.trace(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "generation_config.json"])
def test_a_pipe_among_the_files_of_a_checkpoint_is_not_waited_for(tmp_path, name):
    folder = write_checkpoint(tmp_path / "source")
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(InputError, match=f"{name} is a pipe, a socket or a device"):
        aqtx.trace(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "notes"])
def test_links_that_lead_nowhere_or_in_a_circle_are_told(tmp_path, name):
    folder = write_checkpoint(tmp_path / "source")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(folder / "gone")
    with pytest.raises(InputError, match=f"{name} is a link that leads nowhere"):
        aqtx.trace(folder)
    (folder / name).unlink()
    (folder / name).symlink_to(folder / name)
    with pytest.raises(InputError, match=f"{name} is a link that leads nowhere"):
        aqtx.trace(folder)
