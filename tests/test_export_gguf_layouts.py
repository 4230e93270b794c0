"""Parameters that llama.cpp stores otherwise than checkpoints do, by its own decoders: each value, written down"""

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader

import aqtx
from aqtx.checkpoint.exports.run import export
from aqtx.formats import QuantizedTensor
from tests.gguf_cases import ALL, SIZES
from tests.llama_cpp import decode
from tests.model_cases import oracle
from tests.quantized_folders import quantized, with_tokenizer


class File:
    """Values of a file by llama.cpp's own decoders."""

    def __init__(self, file: Path) -> None:
        self.tensors = {tensor.name: tensor for tensor in GGUFReader(file).tensors}

    def __call__(self, name: str, *shape: int) -> torch.Tensor:
        tensor = self.tensors[name]
        if tensor.tensor_type.name in ("F32", "BF16"):
            raw = np.ascontiguousarray(tensor.data)
            wide = raw if tensor.tensor_type.name == "F32" else (raw.view(np.uint16).astype(np.uint32) << 16)
            return torch.from_numpy(wide.view(np.float32).reshape(shape).copy())
        return torch.from_numpy(decode(tensor.data, tensor.tensor_type.name, int(np.prod(shape))).reshape(shape))


def rounded(case: str, root: Path, formats: dict[str, str], **settings: object) -> tuple[aqtx.Program, File]:
    """A bf16 model with codes, and its file."""
    name, own = ALL[case]
    oracle(name, **(SIZES | own | settings)).to(torch.bfloat16).save_pretrained(root / "source")
    folder = quantized(with_tokenizer(root / "source"), root / "q", formats)
    return aqtx.load(folder), File(export(folder, "gguf", root / "model.gguf").path)


def plain(program: aqtx.Program, name: str) -> torch.Tensor:
    value = program.weights.get(name)
    return value.dequantize(torch.float32) if isinstance(value, QuantizedTensor) else value.float()


def test_qwen3_next_has_queries_keys_values_and_gates_apart(tmp_path: Path) -> None:
    """Two key heads of 16 with two value heads of 16 each: [q k v v z z] a key head in the checkpoint."""
    formats = {"*.in_proj_qkvz": "int4_g32", "*.in_proj_ba": "int8_g32"}
    program, file = rounded("qwen3_next", tmp_path, formats)
    own = plain(program, "model.layers.0.linear_attn.in_proj_qkvz.weight").reshape(2, 6, 16, 64)
    mixed = torch.cat([own[:, 0].flatten(0, 1), own[:, 1].flatten(0, 1), own[:, 2:4].flatten(0, 2)])
    assert torch.equal(file("blk.0.attn_qkv.weight", 128, 64), mixed)
    assert torch.equal(file("blk.0.attn_gate.weight", 64, 64), own[:, 4:].flatten(0, 2))
    assert torch.equal(
        file("blk.0.ssm_ba.weight", 8, 64), plain(program, "model.layers.0.linear_attn.in_proj_ba.weight")
    )
    assert file.tensors["blk.0.attn_qkv.weight"].tensor_type.name == "Q4_0"
    assert torch.equal(
        file("blk.0.ssm_a", 4), -plain(program, "model.layers.0.linear_attn.A_log").double().exp().float()
    )
    assert torch.equal(file("blk.0.ssm_dt.bias", 4), plain(program, "model.layers.0.linear_attn.dt_bias"))
    kernel = plain(program, "model.layers.0.linear_attn.conv1d.weight")
    assert torch.equal(file("blk.0.ssm_conv1d.weight", 128, 4), kernel[:, 0])
    for name, stored in (("input_layernorm", "attn_norm"), ("post_attention_layernorm", "post_attention_norm")):
        assert torch.equal(file(f"blk.0.{stored}.weight", 64), 1 + plain(program, f"model.layers.0.{name}.weight"))
    assert torch.equal(
        file("blk.1.attn_q_norm.weight", 32), 1 + plain(program, "model.layers.1.self_attn.q_norm.weight")
    )
    assert torch.equal(file("blk.0.ssm_norm.weight", 16), plain(program, "model.layers.0.linear_attn.norm.weight"))
    assert torch.equal(file("output_norm.weight", 64), 1 + plain(program, "model.norm.weight"))


@pytest.mark.slow
def test_qwen3_5_has_value_heads_in_turn(tmp_path: Path) -> None:
    """Heads 0 and 1 read key head 0, heads 2 and 3 key head 1: the file has them as 0, 2, 1, 3."""
    formats = {"*.in_proj_z": "q4_k", "*.in_proj_qkv": "int4_g32", "*.linear_attn.out_proj": "int8_g32"}
    wide = {"hidden_size": 256, "linear_value_head_dim": 32, "linear_key_head_dim": 32}
    program, file = rounded("qwen3_5_moe_text", tmp_path, formats, **wide)
    turn, block = [0, 2, 1, 3], "model.layers.0.linear_attn"
    gates = plain(program, f"{block}.in_proj_z.weight").reshape(4, 32, 256)
    assert torch.equal(file("blk.0.attn_gate.weight", 4, 32, 256), gates[turn])
    mixed = plain(program, f"{block}.in_proj_qkv.weight")
    values = mixed[128:].reshape(4, 32, 256)[turn].flatten(0, 1)
    assert torch.equal(file("blk.0.attn_qkv.weight", 256, 256), torch.cat([mixed[:128], values]))
    out = plain(program, f"{block}.out_proj.weight").reshape(256, 4, 32)
    assert torch.equal(file("blk.0.ssm_out.weight", 256, 4, 32), out[:, turn])
    kernel = plain(program, f"{block}.conv1d.weight")[:, 0]
    channels = torch.cat([kernel[:128], kernel[128:].reshape(4, 32, 4)[turn].flatten(0, 1)])
    assert torch.equal(file("blk.0.ssm_conv1d.weight", 256, 4), channels)
    assert torch.equal(file("blk.0.ssm_a", 4), -plain(program, f"{block}.A_log").double().exp().float()[turn])
    assert torch.equal(file("blk.0.ssm_dt.bias", 4), plain(program, f"{block}.dt_bias")[turn])
    for name, stored in (("a", "alpha"), ("b", "beta")):
        scores = plain(program, f"{block}.in_proj_{name}.weight")
        assert torch.equal(file(f"blk.0.ssm_{stored}.weight", 4, 256), scores[turn])


@pytest.mark.parametrize("fmt", ["int4_g32", None])
def test_deepseek_has_keys_turned_a_head(fmt: str | None, tmp_path: Path) -> None:
    """Codes of keys run along the other side, so that their values are told in float32."""
    formats = {"*.kv_b_proj": fmt} if fmt else {"lm_head": "int8"}
    program, file = rounded("deepseek_v3", tmp_path, formats, kv_lora_rank=32)
    own = plain(program, "model.layers.1.self_attn.kv_b_proj.weight").reshape(4, 12 + 20, 32)
    assert torch.equal(file("blk.1.attn_k_b.weight", 4, 32, 12), own[:, :12].transpose(1, 2))
    assert torch.equal(file("blk.1.attn_v_b.weight", 4, 20, 32), own[:, 12:])
    kinds = [file.tensors[f"blk.1.attn_{part}_b.weight"].tensor_type.name for part in "kv"]
    assert kinds == (["F32", "Q4_0"] if fmt else ["BF16", "BF16"])
    bias = plain(program, "model.layers.1.mlp.gate.e_score_correction_bias")
    assert torch.equal(file("blk.1.exp_probs_b.bias", 8), bias)


@pytest.mark.slow
def test_gpt_oss_has_biases_of_gate_and_up_apart(tmp_path: Path) -> None:
    program, file = rounded("gpt_oss", tmp_path, {"*.experts.*": "mxfp4"})
    block = "model.layers.0"
    bias = plain(program, f"{block}.mlp.experts.gate_up_proj_bias")
    assert torch.equal(file("blk.0.ffn_gate_exps.bias", 8, 64), bias[:, ::2])
    assert torch.equal(file("blk.0.ffn_up_exps.bias", 8, 64), bias[:, 1::2])
    assert torch.equal(file("blk.0.ffn_down_exps.bias", 8, 64), plain(program, f"{block}.mlp.experts.down_proj_bias"))
    assert torch.equal(file("blk.0.attn_sinks.weight", 4), plain(program, f"{block}.self_attn.sinks"))
    for name in ("gate", "up", "down"):
        stack = file(f"blk.0.ffn_{name}_exps.weight", 8, 64, 64)
        for site in program.sites_by_weight()[f"{block}.mlp.experts.{name}_proj"]:
            assert torch.equal(stack[site.expert], program.stored(site).dequantize(torch.float32))
