"""Checkpoints that come packed: read as transformers, compressed-tensors and the definitions read them."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from model_cases import SMALL, randomize
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import aqtx
from aqtx.checkpoint.packed.open import open_reader
from aqtx.checkpoint.reader import CheckpointReader
from aqtx.cli import main
from aqtx.errors import InputError
from aqtx.formats import quantize
from tests.marks import slow

WIDE = SMALL | {"hidden_size": 256, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 64}
MOE = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
LATENT = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 96,
    "q_lora_rank": 128,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}


def saved(folder: Path, model_type: str, **settings: Any) -> nn.Module:
    """A random bf16 checkpoint of transformers' class."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **(WIDE | settings))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    randomize(model)
    model.save_pretrained(folder)
    return model


def packed(folder: Path, tensors: dict[str, Tensor], section: dict[str, Any]) -> Path:
    """The folder with other tensors and a `quantization_config`."""
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": section}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def in_blocks(weight: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """FP8 codes and float32 scales of blocks, the last of which may be ragged."""
    rows, columns = (-(-size // block) for size in weight.shape)
    codes, scales = torch.empty(weight.shape, dtype=torch.float8_e4m3fn), torch.empty(rows, columns)
    for i in range(rows):
        for j in range(columns):
            part = (slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block))
            scales[i, j] = weight[part].float().abs().max() / 448
            codes[part] = (weight[part].float() / scales[i, j]).to(torch.float8_e4m3fn)
    return codes, scales


def fp8_of(tensors: dict[str, Tensor], block: int) -> dict[str, Tensor]:
    """Every linear but the head and routers in FP8."""
    made = {}
    for key, value in tensors.items():
        if value.dim() == 2 and not any(part in key for part in ("lm_head", "embed", "mlp.gate.")):
            made[key], made[f"{key}_scale_inv"] = in_blocks(value, block)
        else:
            made[key] = value
    return made


def theirs_of(folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """What transformers loads, experts split."""
    from transformers import AutoModelForCausalLM

    from aqtx.checkpoint.huggingface.skeleton import canonical_tensors

    return canonical_tensors(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype))


def assert_read_alike(folder: Path, dtype: torch.dtype) -> aqtx.Program:
    """Every parameter bit for bit as transformers loads it."""
    program, theirs = aqtx.trace(folder, dtype), theirs_of(folder, dtype)
    names = [name for name in program.weights.names() if name not in program.weights.tied]
    assert set(names) == set(theirs)
    assert [name for name in names if not torch.equal(program.weights.get(name), theirs[name].detach())] == []
    return program


@pytest.mark.parametrize(
    ("model_type", "settings"), [("deepseek_v3", LATENT), *slow(("qwen3", {}), ("qwen3_moe", MOE))]
)
def test_fp8_in_blocks_is_read_as_transformers_reads_it(
    model_type: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    saved(tmp_path, model_type, **settings)
    section = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [32, 32]}
    section["modules_to_not_convert"] = ["lm_head"]
    packed(tmp_path, fp8_of(load_file(tmp_path / "model.safetensors"), 32), section)
    program = assert_read_alike(tmp_path, torch.bfloat16)
    assert program.packed_source == "fp8 e4m3, blocks 32 x 32"
    assert "quantization_config" not in program.config


def reader_of(folder: Path, dtype: torch.dtype = torch.float32, **tensors: Tensor) -> CheckpointReader:
    """A reader of nothing but these tensors."""
    config = json.loads((folder / "config.json").read_text()) if (folder / "config.json").exists() else {}
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "model.safetensors")
    return open_reader(folder, config, dtype)


def with_config(folder: Path, **section: Any) -> Path:
    (folder / "config.json").write_text(json.dumps({"dtype": "bfloat16", "quantization_config": section}))
    return folder


E4M3 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)


@pytest.mark.parametrize(
    ("shape", "scale", "kind"),
    [
        ((5, 7), (), "a scale per matrix"),
        ((5, 7), (1,), "a scale per matrix"),
        ((5, 7), (5,), "a scale per row"),
        ((5, 7), (5, 1), "a scale per row"),
        ((5, 7), (2, 3), "blocks 3 x 3"),
        ((2, 5, 7), (2, 2, 3), "blocks 3 x 3"),
        ((2, 5, 7), (2,), "a scale per matrix"),
        ((2, 5, 7), (2, 5), "a scale per row"),
    ],
)
def test_fp8_scales_reach_as_far_as_their_shape_says(
    shape: tuple[int, ...], scale: tuple[int, ...], kind: str, tmp_path: Path
) -> None:
    """Against ml_dtypes' table of values, number by number."""
    codes = torch.randint(0, 120, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    scales = torch.rand(scale, generator=torch.Generator().manual_seed(1)) + 0.5
    with_config(tmp_path, quant_method="fp8", weight_block_size=[3, 3] if "blocks" in kind else None)
    tensors = {"w.weight": codes.view(torch.float8_e4m3fn), "w.weight_scale": scales, "w.input_scale": torch.ones(1)}
    reader = reader_of(tmp_path, **tensors)
    assert reader.found == f"fp8 e4m3, {kind} (1 scales of inputs left out)"
    wanted = np.empty(shape, np.float32)
    for at in np.ndindex(shape):
        wanted[at] = E4M3[codes[at].item()] * scales[scale_of(at, shape, scale)].item()
    assert np.array_equal(reader.get("w.weight").numpy(), wanted)


def scale_of(at: tuple[int, ...], shape: tuple[int, ...], scale: tuple[int, ...]) -> tuple[int, ...]:
    """Where the scale of a number lies: one for all, one of its row, or one of its block of 3 x 3."""
    return tuple(
        0 if count == 1 else index if count == size else index // 3
        for index, size, count in zip(at, shape, scale, strict=False)
    )


@pytest.mark.parametrize("dtype", [torch.float8_e8m0fnu, torch.uint8])
def test_scales_that_are_powers_of_two(dtype: torch.dtype, tmp_path: Path) -> None:
    with_config(tmp_path, quant_method="fp8", weight_block_size=[1, 32])
    codes = torch.full((2, 64), 0x38, dtype=torch.uint8)  # 1.0
    scales = torch.tensor([[127, 128], [126, 120]], dtype=torch.uint8)
    reader = reader_of(tmp_path, **{"w.weight": codes.view(torch.float8_e4m3fn), "w.scale": scales.view(dtype)})
    assert reader.get("w.weight")[:, ::32].tolist() == [[1.0, 2.0], [0.5, 2.0**-7]]


def blocks_and_scales(weight: Tensor) -> tuple[Tensor, Tensor]:
    """gpt-oss' bytes of [E, N, K], by `mxfp4@floor` of ours, whose codes other tests hold against ml_dtypes."""
    parts = [quantize(matrix.float(), "mxfp4@floor").to_disk() for matrix in weight]
    codes = torch.stack([part["qdata"] for part in parts]).unflatten(-1, (-1, 16))
    return codes, torch.stack([part["scale"] for part in parts])


def gpt_oss(folder: Path) -> dict[str, Tensor]:
    """A small gpt-oss with MXFP4 experts; returns its experts' parts."""
    saved(folder, "gpt_oss", **MOE)
    parts = {}
    tensors = load_file(folder / "model.safetensors")
    for key in [key for key in tensors if key.endswith(("gate_up_proj", "down_proj"))]:
        parts[f"{key}_blocks"], parts[f"{key}_scales"] = blocks_and_scales(tensors.pop(key).transpose(1, 2))
    packed(folder, tensors | parts, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    return parts


def test_mxfp4_is_read_as_transformers_reads_it_and_its_codes_come_back(tmp_path: Path) -> None:
    parts = gpt_oss(tmp_path)
    program = assert_read_alike(tmp_path, torch.bfloat16)
    assert program.packed_source == "mxfp4, blocks of 32"
    experts = [site for site in program.sites() if site.expert is not None]
    assert len(experts) == 2 * 3 * 4
    for site in experts:
        again = quantize(program.read(site), "mxfp4@floor").to_disk()
        stem = site.weight.replace("gate_proj", "gate_up_proj").replace(".up_proj", ".gate_up_proj")
        rows = slice(1 if ".up_proj" in site.weight else 0, None, 1 if "down" in site.weight else 2)
        codes, scales = (parts[f"{stem}_{part}"][site.expert][rows] for part in ("blocks", "scales"))
        assert torch.equal(again["qdata"].flatten(), codes.flatten())
        assert torch.equal(again["scale"], scales)


def test_any_mxfp4_keeps_its_values_and_where_a_block_is_full_its_codes(tmp_path: Path) -> None:
    """A block whose largest code is below 4 fits a smaller scale, under which its codes are larger ones."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (1, 64, 4, 16), generator=generator, dtype=torch.uint8)
    codes[0, ::3] &= 0x33  # none above 1.5
    scales = torch.randint(100, 150, (1, 64, 4), generator=generator, dtype=torch.uint8)
    with_config(tmp_path, quant_method="mxfp4")
    reader = reader_of(tmp_path, w_blocks=codes, w_scales=scales)
    values = reader.get("w")[0].t()
    table = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    nibbles = np.stack([codes.numpy() & 15, codes.numpy() >> 4], -1).reshape(64, 128)
    wanted = table[nibbles] * np.exp2(scales.numpy().astype(np.float32) - 127).repeat(32).reshape(64, 128)
    assert np.array_equal(values.numpy(), wanted)
    again = quantize(values.contiguous(), "mxfp4@floor")
    assert torch.equal(again.dequantize(torch.float32), values)
    full = torch.from_numpy(np.abs(table[nibbles]).reshape(64, 4, 32).max(-1) >= 4)
    assert 0 < int(full.sum()) < full.numel()
    parts = again.to_disk()
    assert torch.equal(parts["scale"][full], scales[0][full])
    assert torch.equal(parts["qdata"].unflatten(-1, (4, 16))[full], codes[0][full])


GROUPED = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
# name -> format, weights' arguments, shape of the scales of a weight of 48 x 96, kind as it is told
COMPRESSED: dict[str, tuple[str, dict[str, Any], tuple[int, ...], str]] = {
    "int4 in groups": ("pack-quantized", GROUPED, (48, 3), "int4, groups of 32"),
    "int4 with zero points": ("pack-quantized", GROUPED | {"symmetric": False}, (48, 3), "int4, groups of 32"),
    "int3 a row": ("pack-quantized", {"num_bits": 3, "strategy": "channel"}, (48, 1), "int3, a scale per row"),
    "int8 a row": ("int-quantized", {"num_bits": 8, "strategy": "channel"}, (48, 1), "int8, a scale per row"),
    "int8 with zero points": (
        "int-quantized",
        {"num_bits": 8, "strategy": "channel", "symmetric": False},
        (48, 1),
        "int8, a scale per row",
    ),
    "fp8 a matrix": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "tensor"},
        (1,),
        "fp8 e4m3, a scale per matrix",
    ),
    "fp8 in blocks": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 32]},
        (3, 3),
        "fp8 e4m3, blocks 16 x 32",
    ),
    "nvfp4": (
        "nvfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
        (48, 6),
        "fp4 e2m1, groups of 16",
    ),
}


@pytest.mark.parametrize("name", list(COMPRESSED))
def test_compressed_tensors_decompresses_to_the_same_values(name: str, tmp_path: Path) -> None:
    """The library packs random codes, and unpacks them again as the oracle."""
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    layout, weights, shape, kind = COMPRESSED[name]
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, format=layout)
    compressor: Any = BaseCompressor.get_value_from_registry(layout)
    generator = torch.Generator().manual_seed(0)
    state = {"weight": torch.randn(48, 96, generator=generator)}
    state["weight_scale"] = torch.rand(shape, generator=generator) / 2 + 0.25
    if weights.get("symmetric") is False:
        state["weight_zero_point"] = torch.randint(-3, 4, shape, generator=generator, dtype=torch.int8)
    if layout.startswith("nvfp4"):
        state["weight_global_scale"] = torch.tensor([37.5])
    made = compressor.compress(state, scheme)
    wanted = _unpacked(compressor, made, scheme).float()
    group = {"targets": ["Linear"], "weights": weights, "format": layout}
    with_config(tmp_path, quant_method="compressed-tensors", format=layout, config_groups={"group_0": group})
    reader = reader_of(tmp_path, **{f"layer.{key}": value for key, value in made.items()})
    assert reader.found == f"compressed-tensors {kind}"
    found = reader.get("layer.weight")
    # NVFP4: two scales are multiplied, which the library does in another order: two roundings of 2^-24 each way
    slack = 4 * 2.0**-24 * wanted.abs() if layout.startswith("nvfp4") else torch.zeros(())
    assert bool(((found - wanted).abs() <= slack).all())
    assert torch.equal(reader.part("layer.weight", (range(3, 9, 2), range(5, 70))), found[3:9:2, 5:70])


def _unpacked(compressor: Any, made: dict[str, Tensor], scheme: Any) -> Tensor:
    """The library's values; of NVFP4 in float32, which its decompression computes in bf16."""
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    if "weight_global_scale" not in made:
        weight: Tensor = compressor.decompress(dict(made), scheme)["weight"]
        return weight
    packed, scale = made["weight_packed"], made["weight_scale"].float()
    values = unpack_fp4_from_uint8(packed, len(packed), 2 * packed.shape[1], dtype=torch.float32)
    return dequantize(values, scale, args=scheme.weights, global_scale=made["weight_global_scale"])


def test_columns_that_activation_order_moved(tmp_path: Path) -> None:
    """`weight_g_idx` names the group of each column."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (6, 64), generator=generator, dtype=torch.int8)
    scale, groups = torch.rand(6, 2, generator=generator), torch.randint(0, 2, (64,), generator=generator)
    group = {"targets": ["re:.*layer"], "weights": GROUPED | {"actorder": "group"}}
    with_config(tmp_path, quant_method="compressed-tensors", format="pack-quantized", config_groups={"a": group})
    reader = reader_of(
        tmp_path,
        **{
            "layer.weight_packed": pack_to_int32(codes, 4),
            "layer.weight_scale": scale,
            "layer.weight_g_idx": groups.int(),
            "layer.weight_shape": torch.tensor([6, 64]),
        },
    )
    wanted = torch.stack([codes[:, k].float() * scale[:, group] for k, group in enumerate(groups)], 1)
    assert torch.equal(reader.get("layer.weight"), wanted)


CT = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "gptq": ({"quant_method": "gptq", "bits": 4}, r"quantized already, by 'gptq', which aqtx does not read"),
    "awq": ({"quant_method": "awq", "bits": 4}, r"by 'awq', which aqtx does not read"),
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, r"by 'bitsandbytes'"),
    "unnamed": ({"bits": 4}, r"by None, which"),
    "a list": ([4], r"quantization_config must be an object, not \[4\]"),
    "sparse": (
        CT | {"format": "marlin-24", "config_groups": {}},
        r"compressed-tensors' format 'marlin-24' is not read",
    ),
    "strategy": (
        CT | {"config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "attn_head"}}}},
        r"config_groups\.g\.weights: the strategy 'attn_head' is not read, only tensor, channel",
    ),
    "bits": (
        CT | {"config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 5, "type": "float"}}}},
        r"'float' of 5 bits is not read",
    ),
    "rotations": (CT | {"config_groups": {}, "transform_config": {"R1": {}}}, r"transform_config \(rotations"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_is_not_understood_is_one_sentence_before_anything_is_read(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """There are no weights at all: the config alone is enough."""
    section, says = REFUSED[name]
    config = {**WIDE, "model_type": "llama", "quantization_config": section}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=says) as refused:
        aqtx.trace(tmp_path)
    assert len(refused.value.problems) == 1
    code = main(["apply", "quickstart", f"model.source={tmp_path}", f"output={tmp_path / 'out'}"])
    assert code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_packed_config_is_enough_for_a_plan_without_weights(tmp_path: Path) -> None:
    from aqtx.checkpoint.open import open_program

    settings = {**WIDE, "model_type": "llama", "quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    program = open_program(tmp_path, None, config_only=True)
    assert "quantization_config" not in program.config
    assert len(program.sites()) == 2 * 7 + 1


def test_a_file_beside_the_config_that_tells_of_packing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**WIDE, "model_type": "llama"}))
    (tmp_path / "hf_quant_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"hf_quant_config\.json: .* by 'modelopt', which aqtx does not read"):
        aqtx.trace(tmp_path)


def test_what_was_found_is_printed_and_stands_in_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "source"
    saved(source, "qwen3")
    section = {"quant_method": "fp8", "weight_block_size": [64, 64]}
    packed(source, fp8_of(load_file(source / "model.safetensors"), 64), section)
    recipe = tmp_path / "recipe.yaml"
    passes = "passes: [{assign_plan: {method: uniform, candidates: [int4_g32]}}, quantize, emit]"
    recipe.write_text(f"version: 1\nmodel: {{source: {source}}}\n{passes}\noutput: {tmp_path / 'out'}\n")
    assert main(["apply", str(recipe)]) == 0
    told = capsys.readouterr()
    assert told.err.count("aqtx: source: fp8 e4m3, blocks 64 x 64\n") == 1
    assert "\nsource: fp8 e4m3, blocks 64 x 64\n" in told.out
    assert json.loads((tmp_path / "out/report.json").read_text())["source"] == "fp8 e4m3, blocks 64 x 64"
    assert "Source: fp8 e4m3, blocks 64 x 64;" in (tmp_path / "out/report.html").read_text()
    written = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert written["quant_method"] == "aqtx"
