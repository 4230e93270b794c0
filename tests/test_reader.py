"""Reading checkpoints as they lie on the hub: shards, names, and everything that can be wrong with them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from aqtx.checkpoint.locate import locate
from aqtx.checkpoint.reader import CheckpointReader
from aqtx.errors import InputError
from aqtx.models import MODEL_TYPES, build, load_config
from aqtx.program.names import NamesTable, stacked_name
from tests.model_cases import CASES, oracle, ours, token_ids

FAMILIES = ("olmoe", "mixtral", "qwen2-moe", "llama-tied", "qwen3")


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small OLMoE checkpoint in many shards."""
    folder = tmp_path_factory.mktemp("olmoe")
    oracle("olmoe").to(torch.bfloat16).save_pretrained(folder, max_shard_size="40KB")
    return folder


def shapes_of(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of our model's parameters."""
    with torch.device("meta"):
        model = build(load_config(folder))
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def copied(folder: Path, target: Path, **changes: torch.Tensor | None) -> Path:
    """A single-file copy with tensors replaced, added or (None) left out."""
    reader = CheckpointReader(folder)
    tensors = {key: reader.get(key).clone() for key in reader.entries} | changes
    target.mkdir(exist_ok=True)
    save_file({key: value for key, value in tensors.items() if value is not None}, target / "model.safetensors")
    (target / "config.json").write_text((folder / "config.json").read_text())
    return target


@pytest.mark.parametrize("name", FAMILIES)
def test_names_table_is_a_bijection_onto_the_files_of_transformers(name: str, tmp_path: Path) -> None:
    oracle(name).save_pretrained(tmp_path)
    table = NamesTable(shapes_of(tmp_path))
    on_disk = set(load_file(tmp_path / "model.safetensors"))
    assert set(table.from_disk) == on_disk
    back = {(parameter, index) for parameter, keys in table.to_disk.items() for index in range(len(keys))}
    assert {(parameter, expert or 0) for parameter, expert in table.from_disk.values()} == back
    assert all(table.to_disk[parameter][expert or 0] == key for key, (parameter, expert) in table.from_disk.items())
    assert all(stacked_name(key) in (found, None) for key, found in table.from_disk.items())


def test_names_that_collide_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"experts\.0\.w1\.weight stands for both"):
        NamesTable({"m.experts.w1": (2, 4, 4), "m.experts.0.w1.weight": (4, 4)})


def test_sharded_folder_gives_shapes_without_reading_and_mapped_tensors(olmoe: Path) -> None:
    reader = CheckpointReader(olmoe)
    key = "model.layers.1.mlp.experts.7.down_proj.weight"
    assert len({entry.file for entry in reader.entries.values()}) > 3
    assert reader.shape(key) == (64, 48)
    assert reader.dtype() == torch.bfloat16
    reader.check(shapes_of(olmoe))
    assert reader.get(key).shape == (64, 48)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_dtype_is_that_of_most_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    save_file(
        {"a": torch.zeros(9, dtype=dtype), "b": torch.zeros(4, dtype=torch.bfloat16)}, tmp_path / "model.safetensors"
    )
    assert CheckpointReader(tmp_path).dtype() == dtype


def test_tied_head_may_be_on_disk_or_not(tmp_path: Path) -> None:
    theirs = oracle("llama-tied")
    theirs.save_pretrained(tmp_path / "without")
    head = theirs.state_dict()["model.embed_tokens.weight"].clone()
    copied(tmp_path / "without", tmp_path / "with", **{"lm_head.weight": head})
    ids = token_ids(1, 5)
    assert torch.equal(ours(tmp_path / "without")(ids), ours(tmp_path / "with")(ids))


def test_all_differences_from_the_model_are_told_at_once(olmoe: Path, tmp_path: Path) -> None:
    folder = copied(
        olmoe,
        tmp_path / "broken",
        **{
            "model.layers.0.mlp.experts.3.up_proj.weight": None,
            "model.norm.weight": None,
            "model.layers.2.self_attn.q_proj.bias": torch.zeros(64),
            "model.layers.0.mlp.gate.weight": torch.zeros(7, 64),
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8),  # older files store it; no problem
        },
    )
    with pytest.raises(InputError) as caught:
        CheckpointReader(folder).check(shapes_of(folder))
    assert [problem.partition(": ")[2] for problem in caught.value.problems] == [
        "tensor model.layers.0.mlp.experts.3.up_proj.weight is missing",
        "tensor model.norm.weight is missing",
        "tensor model.layers.2.self_attn.q_proj.bias belongs to no parameter of the model",
        "model.layers.0.mlp.gate.weight has shape [7, 64], config.json asks for [8, 64]",
    ]


def test_quantized_sites_are_expected_as_codes(olmoe: Path, tmp_path: Path) -> None:
    key = "model.layers.0.self_attn.q_proj.weight"
    parts = {"qdata": torch.zeros(64, 32, dtype=torch.uint8), "scale": torch.zeros(64, 2, dtype=torch.uint8)}
    codes = {f"{key}.{part}": tensor for part, tensor in parts.items()}
    folder = copied(olmoe, tmp_path / "quantized", **{key: None}, **codes)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    reader = CheckpointReader(folder)
    reader.check(shapes_of(folder), quantized={key.removesuffix(".weight"): "mxfp4"})
    assert reader.dtype() == torch.float32
    with pytest.raises(InputError, match=r"q_proj.weight is missing"):
        reader.check(shapes_of(folder))


def test_pickled_weights_are_refused_with_the_command_to_convert_them(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match=r"pickled weights \(pytorch_model.bin\).*save_pretrained"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize("shard", ["../model.safetensors", "/tmp/model.safetensors", "a/../../model.safetensors"])
def test_shards_outside_the_folder_are_refused(shard: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(InputError, match="lies outside the folder"):
        CheckpointReader(tmp_path)


def test_damaged_files_are_told_by_name(olmoe: Path, tmp_path: Path) -> None:
    whole = copied(olmoe, tmp_path / "cut") / "model.safetensors"
    whole.write_bytes(whole.read_bytes()[:-10])
    with pytest.raises(InputError, match=r"model.safetensors is truncated: its header asks for"):
        CheckpointReader(whole.parent)
    whole.write_bytes(b"PK not a safetensors file")
    with pytest.raises(InputError, match="truncated or no safetensors file"):
        CheckpointReader(whole.parent)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(InputError, match=r"shard gone.safetensors is missing"):
        CheckpointReader(tmp_path)


def test_hub_names_come_from_the_cache(olmoe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache's own layout: refs/main names the snapshot, whose files are links to blobs."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository, commit = tmp_path / "models--someone--tiny", "0" * 40
    snapshot = repository / "snapshots" / commit
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for place, file in enumerate(olmoe.iterdir()):
        (repository / "blobs" / f"{place}").write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{place}")
    assert locate("someone/tiny") == snapshot
    CheckpointReader(snapshot).check(shapes_of(snapshot))


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("tinymoee", "neither a folder nor a shipped model"),
        ("nobody/nothing", "not in the hub's cache while the hub cannot be reached"),
    ],
)
def test_unknown_sources_are_one_sentence(
    source: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=told) as caught:
        locate(source)
    assert len(caught.value.problems) == 1


def test_every_case_of_the_suite_is_of_a_supported_type() -> None:
    assert {model_type for model_type, _ in CASES.values()} == MODEL_TYPES.keys() - {"deepseek"}  # has tests of its own


def test_a_quantization_config_of_null_is_none(olmoe: Path, tmp_path: Path) -> None:
    config = json.loads((olmoe / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": None}))
    assert load_config(tmp_path) == config
