"""compressed-tensors: what transformers loads, with the library's own decompression as the oracle."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import aqtx
from aqtx.checkpoint.exports.run import export
from aqtx.checkpoint.huggingface.names import from_disk
from aqtx.checkpoint.open import open_program
from aqtx.errors import InputError
from tests.marks import slow
from tests.model_cases import oracle
from tests.quantized_folders import config_of, quantized
from tests.tiny import write_checkpoint

WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3}
# every format that has a form and that transformers reads, in the projections of a dense model
DENSE = (
    {
        "*.0.self_attn.q_proj": "int4_g32",
        "*.0.self_attn.k_proj": "int8_row",
        "*.0.self_attn.v_proj": "int3_g64",
        "*.0.self_attn.o_proj": "int6",
        "*.0.mlp.gate_proj": "mxfp4",
        "*.0.mlp.up_proj": "mxfp8",
        "*.0.mlp.down_proj": "fp8_row",
    },
    {"*.1.self_attn.q_proj": "int2_g64", "*.1.self_attn.k_proj": "mxfp6", "*.1.mlp.down_proj": "int4_row"},
    {"*.2.mlp.gate_proj": "nvfp4", "*.2.mlp.up_proj": "int8_g32", "lm_head": "int4"},
)


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    """Parameters of transformers' model, decompressed by compressed-tensors when it first computes."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
    return dict(model.state_dict())


def assert_same_parameters(folder: Path, theirs: dict[str, torch.Tensor]) -> int:
    """Every parameter of our model bit for bit in theirs, where gate and up of experts are one stack."""
    own, kind = aqtx.load(folder), config_of(folder)["model_type"]
    values = {
        from_disk(kind, name): value.dequantize() if hasattr(value, "dequantize") else value
        for name, value in own.parameters(own.weights.names()).items()
    }
    unlike = []
    for name, value in values.items():
        stack, _, projection = name.rpartition(".")
        found = theirs.get(name)
        if found is None and projection in ("gate_proj", "up_proj"):
            found = theirs[f"{stack}.gate_up_proj"].chunk(2, 1)[projection == "up_proj"]
        if found is None or not torch.equal(found, value):
            unlike.append(name)
    assert unlike == []
    return len(values)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("dense")
    oracle("llama", **WIDE).to(torch.bfloat16).save_pretrained(root / "source")
    return quantized(root / "source", root / "quantized", {k: v for part in DENSE for k, v in part.items()})


def test_every_format_with_a_form_loads_bit_for_bit(dense: Path, tmp_path: Path) -> None:
    made = export(dense, "compressed-tensors", tmp_path / "out")
    assert made.checked is not None and made.checked.allowed == 0 and made.checked.values > 460_000
    assert made.clients == ("transformers",)  # q, k and v differ, which vLLM fuses
    assert assert_same_parameters(dense, loaded(tmp_path / "out")) == 3 * 9 + 3


def test_experts_of_one_scheme_load_bit_for_bit(tmp_path: Path) -> None:
    folder = quantized("tinymoe", tmp_path / "q", {"*.experts.*": "int4_g32", "*.q_proj": "mxfp6"})
    made = export(folder, "compressed-tensors", tmp_path / "out")
    assert made.clients == ("transformers",)
    assert assert_same_parameters(folder, loaded(tmp_path / "out")) == 4 * 12 + 3


@pytest.mark.parametrize(
    "family",
    ["mixtral", *slow("deepseek-v3", "qwen3-moe", "qwen2-moe")],
)
def test_experts_of_other_families_load_bit_for_bit(family: str, tmp_path: Path) -> None:
    oracle(family).to(torch.bfloat16).save_pretrained(tmp_path / "source")
    folder = quantized(tmp_path / "source", tmp_path / "q", {"*.experts.*": "int4_row"})
    made = export(folder, "compressed-tensors", tmp_path / "out")
    assert made.clients == ("vllm", "transformers")
    assert assert_same_parameters(folder, loaded(tmp_path / "out")) == len(aqtx.load(folder).weights.names())


def test_rows_of_one_group_or_shorter_load_bit_for_bit(tmp_path: Path) -> None:
    """A whole row under one scale: told as a group where it is exactly one, else as a row."""
    oracle("llama", hidden_size=64, intermediate_size=32, num_hidden_layers=1).to(torch.bfloat16).save_pretrained(
        tmp_path / "source"
    )
    formats = {"*.[qkv]_proj": "int4_g64", "*.o_proj": "int8", "*.gate_proj": "int5", "*.down_proj": "int3_g64"}
    folder = quantized(tmp_path / "source", tmp_path / "q", formats)
    export(folder, "compressed-tensors", tmp_path / "out")
    groups = config_of(tmp_path / "out")["quantization_config"]["config_groups"].values()
    told = {group["weights"]["num_bits"]: group["weights"].get("group_size") for group in groups}
    assert told == {4: 64, 8: None, 5: None, 3: None}
    assert assert_same_parameters(folder, loaded(tmp_path / "out")) == 9 + 3


def test_experts_have_one_scheme_whatever_the_length_of_their_rows(tmp_path: Path) -> None:
    """Rows of 64 and 32 in groups of 32 are one scheme; in groups of 64, which one row is short of, there is none."""
    oracle("mixtral", hidden_size=64, intermediate_size=32).to(torch.bfloat16).save_pretrained(tmp_path / "source")
    folder = quantized(tmp_path / "source", tmp_path / "q", {"*.experts.*": "int4_g32"})
    assert export(folder, "compressed-tensors", tmp_path / "out").clients == ("vllm", "transformers")
    [group] = config_of(tmp_path / "out")["quantization_config"]["config_groups"].values()
    assert group["weights"]["group_size"] == 32
    assert assert_same_parameters(folder, loaded(tmp_path / "out")) == len(aqtx.load(folder).weights.names())
    short = quantized(tmp_path / "source", tmp_path / "short", {"*.experts.*": "int4_g64"})
    with pytest.raises(InputError) as refused:
        export(short, "compressed-tensors", tmp_path / "short_out")
    for client, told in zip(("vllm", "transformers"), refused.value.problems, strict=True):
        assert re.search(f"{client} has no form for int4_g64 in rows of 32 .*w2; the nearest .* is int4_g32", told)


def test_inputs_rounded_to_int8_become_w8a8(tmp_path: Path) -> None:
    oracle("llama", **WIDE | {"num_hidden_layers": 1}).to(torch.bfloat16).save_pretrained(tmp_path / "source")
    folder = quantized(tmp_path / "source", tmp_path / "q", {"*_proj": "int8_row"}, aq="int8_row")
    made = export(folder, "compressed-tensors", tmp_path / "out")
    [group] = config_of(tmp_path / "out")["quantization_config"]["config_groups"].values()
    assert group["format"] == "int-quantized" and group["input_activations"]["strategy"] == "token"
    assert made.clients == ("vllm", "transformers") and made.notes == []
    assert_same_parameters(folder, loaded(tmp_path / "out"))


@pytest.mark.parametrize(
    ("formats", "says"),
    [
        (
            {"*.experts.*": "mxfp6_e3m2"},
            "has no form for mxfp6_e3m2 in rows of 128: 16 matrices.*nearest.*is mxfp6_e2m3",
        ),
        ({"*.0.*.experts.*": "mxfp6", "*.1.*.experts.*": "int4"}, "vllm has no form for mxfp6_e2m3.*is int6"),
        ({"*.experts.*": "nvfp4"}, "vllm fuses .* differ.* transformers has no form for nvfp4.*wrongly"),
        ({"*.self_attn.q_proj": "mxfp6"}, "transformers loads no unquantized experts"),
    ],
)
def test_what_no_client_loads_is_refused_before_anything_is_written(
    formats: dict[str, str], says: str, tmp_path: Path
) -> None:
    folder = quantized(write_checkpoint(tmp_path / "source"), tmp_path / "q", formats)
    with pytest.raises(InputError) as refused:
        export(folder, "compressed-tensors", tmp_path / "out")
    assert re.search(says, " ".join(refused.value.problems))
    assert not list(tmp_path.glob("out*"))


def test_verification_names_what_differs(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A code that is changed while it is written is found, and nothing is left behind."""
    from aqtx.checkpoint.exports import compressed_tensors

    honest = compressed_tensors.write_shards

    def damaged(tensors: Any, directory: Path) -> None:
        honest(((key, value ^ 1 if key == "lm_head.weight_packed" else value) for key, value in tensors), directory)

    monkeypatch.setattr(compressed_tensors, "write_shards", damaged)
    with pytest.raises(InputError, match=r"lm_head.weight: .* values differ"):
        export(dense, "compressed-tensors", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
    export(dense, "compressed-tensors", tmp_path / "out", verify=False)


def decompressed(tensors: dict[str, torch.Tensor], key: str, bits: int, group: int) -> torch.Tensor:
    """float32 values of an asymmetric INT matrix, unpacked by compressed-tensors' own function."""
    from compressed_tensors.compressors import unpack_from_int32

    shape = torch.Size(tensors[f"{key}_shape"].tolist())
    codes = unpack_from_int32(tensors[f"{key}_packed"], bits, shape).float()
    blocks = torch.Size((shape[0], shape[1] // group))
    zero = unpack_from_int32(tensors[f"{key}_zero_point"], bits, blocks, packed_dim=0).float()
    scale = tensors[f"{key}_scale"].float()
    return ((codes.unflatten(1, (-1, group)) - zero[..., None]) * scale[..., None]).flatten(1)


@pytest.mark.parametrize("name", ["int3_g32_asym", *slow("int4_g32_asym", "int5_g32_asym", "int8_g32_asym")])
def test_asymmetric_experts_are_what_compressed_tensors_unpacks(name: str, tmp_path: Path) -> None:
    """For vLLM; transformers reads their zero points in a wrong shape and is told so."""
    folder = quantized(write_checkpoint(tmp_path / "source"), tmp_path / "q", {"*.experts.*": name})
    made = export(folder, "compressed-tensors", tmp_path / "out")
    assert made.clients == ("vllm",) and any("transformers" in note for note in made.notes)
    [file] = (tmp_path / "out").glob("*.safetensors")
    program, tensors = aqtx.load(folder), load_file(file)
    bits, group, unlike = int(name[3]), int(name.split("_")[1][1:]), []
    for site in program.sites():
        if site.expert is not None:
            found = decompressed(tensors, f"{site.name}.weight", bits, group)
            own = program.stored(site).dequantize(torch.float32)
            unlike += [] if torch.equal(found, own) else [site.name]
    [scheme] = config_of(tmp_path / "out")["quantization_config"]["config_groups"].values()
    assert unlike == [] and scheme["weights"]["symmetric"] is False and scheme["weights"]["group_size"] == group


@pytest.mark.parametrize(
    ("name", "inputs", "form"),
    [("int8_row", "int8_row", "int-quantized"), ("mxfp8", "none", "mxfp8-quantized")],
)
def test_experts_that_transformers_does_not_load_are_for_vllm(
    name: str, inputs: str, form: str, tmp_path: Path
) -> None:
    """transformers 5.24 finds no experts stored as plain `weight` in integers, and MX scales of a wrong shape."""
    folder = quantized(write_checkpoint(tmp_path / "source"), tmp_path / "q", {"*.experts.*": name}, aq=inputs)
    made = export(folder, "compressed-tensors", tmp_path / "out")
    assert made.clients == ("vllm",) and any("not for transformers" in note for note in made.notes)
    [group] = config_of(tmp_path / "out")["quantization_config"]["config_groups"].values()
    assert group["format"] == form and (group["input_activations"] is not None) == (inputs != "none")


def test_a_changed_file_is_told_by_its_checksum(tmp_path: Path) -> None:
    oracle("llama", **WIDE | {"num_hidden_layers": 1}).to(torch.bfloat16).save_pretrained(tmp_path / "source")
    folder = quantized(tmp_path / "source", tmp_path / "q", {"*.up_proj": "int4_g32"})
    made = export(folder, "compressed-tensors", tmp_path / "out").path
    open_program(made, None, check_files=True)
    [weights] = made.glob("*.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(InputError, match=r"safetensors is not what was written: its SHA-256 differs"):
        open_program(made, None, check_files=True)
