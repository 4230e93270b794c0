"""Sharded safetensors: sizes respected, an index that finds everything, the same bytes every time."""

import json

import torch
from safetensors import safe_open

from aqtx.checkpoint import shards
from aqtx.machine.files import sha256


def tensors():
    return [(f"layer.{i}.weight", torch.full((64, 64), float(i))) for i in range(5)]


def test_shards_are_split_by_size_and_indexed(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "MAX_SHARD_BYTES", 2 * 64 * 64 * 4)
    shards.write_shards(tensors(), tmp_path)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 5 * 64 * 64 * 4
    for key, value in tensors():
        with safe_open(tmp_path / index["weight_map"][key], "pt") as file:
            assert torch.equal(file.get_tensor(key), value)


def test_equal_tensors_give_equal_bytes(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        shards.write_shards(tensors(), tmp_path / name)
    digests = [[sha256(path) for path in sorted((tmp_path / name).iterdir())] for name in ("one", "two")]
    assert digests[0] == digests[1]


def test_tensors_of_all_kinds_stay_aligned_and_equal(tmp_path):
    mixed = {
        "odd.qdata": torch.arange(7, dtype=torch.uint8),
        "half.scale": torch.randn(3, 5).bfloat16(),
        "scalar": torch.tensor(2.5),
        "strided": torch.randn(6, 4).t(),
        "ids": torch.arange(3),
    }
    shards.write_shards(mixed.items(), tmp_path)
    with safe_open(tmp_path / "model-00001-of-00001.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        for key, value in mixed.items():
            found = file.get_tensor(key)
            assert found.dtype == value.dtype
            assert torch.equal(found, value)
    assert not list(tmp_path.glob("*.scratch"))
