"""Tensors that a checkpoint holds in float32 among bf16 ones: exact through trace, passes, files and exports."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from model_cases import SMALL, randomize, token_ids
from safetensors.torch import load_file, save_file

import aqtx
from aqtx.checkpoint.exports.run import export
from aqtx.passes.assign_plan import AssignPlan
from aqtx.passes.emit import Emit
from aqtx.passes.finetune_router import FinetuneRouter
from aqtx.passes.quantize import Quantize
from aqtx.passes.unfreeze_router import UnfreezeRouter
from tests.marks import slow, slow_but

ROUTED = {
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "moe_layer_start_index": 0,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
# one family of ours and two that only transformers knows
KINDS = ("deepseek_v3", "dots1", "ernie4_5_moe")


def publish(folder: Path, model_type: str, *more: str) -> dict[str, torch.Tensor]:
    """A bf16 checkpoint whose routers, correction biases and `more` are float32 numbers that bf16 does not have."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **(SMALL | {"num_hidden_layers": 1} | ROUTED))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    randomize(model)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    parts = ("mlp.gate.weight", "e_score_correction_bias", *more)
    generator = torch.Generator().manual_seed(2)
    precise = {
        key: 0.3 * torch.randn(value.shape, generator=generator)
        for key, value in tensors.items()
        if key.endswith(parts)
    }
    assert len(precise) == len(parts)
    assert all(not torch.equal(value, value.bfloat16().float()) for value in precise.values())
    save_file(tensors | precise, folder / "model.safetensors", metadata={"format": "pt"})
    return precise


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder."""
    return {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}


def assert_kept(folder: Path, precise: dict[str, torch.Tensor]) -> None:
    found = stored(folder)
    assert {key: found[key].dtype for key in precise} == dict.fromkeys(precise, torch.float32)
    assert [key for key, value in precise.items() if not torch.equal(found[key], value)] == []


@pytest.mark.parametrize("model_type", slow_but(("deepseek_v3",), KINDS))
def test_routers_and_biases_are_read_and_written_as_they_were_published(model_type: str, tmp_path: Path) -> None:
    """transformers keeps them too, so logits in bf16 agree; ours once rounded them."""
    from transformers import AutoModelForCausalLM

    precise = publish(tmp_path / "source", model_type)
    program, ids = aqtx.trace(tmp_path / "source"), token_ids(2, 9)
    assert program.dtype == torch.bfloat16
    for key, value in precise.items():
        name = key if key in program.weights.specs else key.replace("mlp.moe_statics", "mlp.gate.moe_statics")
        assert program.weights.specs[name].dtype == torch.float32
        assert torch.equal(program.weights.get(name), value), name
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.bfloat16)
    with torch.no_grad():
        expected = theirs(ids).logits.float()
    # a few bf16 roundings (2^-9 each) of values as large as the largest logit; other experts would be far off
    assert (program.module()(ids).float() - expected).abs().max() <= 2**-5 * float(expected.abs().max())
    plan = AssignPlan(method="uniform", candidates=("int4_g32",), keep=("router",))
    rounded = aqtx.run(program, [plan, Quantize(), Emit()])
    aqtx.save(rounded, tmp_path / "saved")
    assert_kept(tmp_path / "saved", precise)
    assert torch.equal(aqtx.load(tmp_path / "saved").module()(ids), rounded.module()(ids))


@pytest.mark.parametrize(
    ("model_type", "targets"), [("deepseek_v3", ("dequantized", "torchao")), *slow(("dots1", ("dequantized",)))]
)
def test_exports_hold_them_too(model_type: str, targets: tuple[str, ...], tmp_path: Path) -> None:
    precise = publish(tmp_path / "source", model_type)
    program = aqtx.trace(tmp_path / "source")
    plan = AssignPlan(method="uniform", candidates=("int4_g32",), keep=("router", "attention", "lm_head"))
    aqtx.save(aqtx.run(program, [plan, Quantize(), Emit()]), tmp_path / "saved")
    for target in targets:
        export(tmp_path / "saved", target, tmp_path / target)
        assert_kept(tmp_path / target, precise)


def test_a_head_and_a_norm_in_float32_are_computed_in_bf16_and_written_as_they_were(tmp_path: Path) -> None:
    """A product of bf16 activations with a float32 matrix does not exist, so the graph rounds; the file does not."""
    precise = publish(tmp_path / "source", "deepseek_v3", "lm_head.weight", "model.norm.weight")
    program, ids = aqtx.trace(tmp_path / "source"), token_ids(1, 5)
    assert program.weights.get("lm_head.weight").dtype == torch.bfloat16
    assert program.module()(ids).dtype == torch.bfloat16
    head = next(site for site in program.sites() if site.name == "lm_head")
    assert torch.equal(program.read(head), precise["lm_head.weight"])
    aqtx.save(program, tmp_path / "saved")
    assert_kept(tmp_path / "saved", precise)
    assert torch.equal(aqtx.load(tmp_path / "saved").module()(ids), program.module()(ids))


def test_routers_are_trained_in_their_own_precision(tmp_path: Path) -> None:
    publish(tmp_path / "source", "deepseek_v3")
    ids = token_ids(8, 16)
    plan = AssignPlan(method="uniform", candidates=("int2_g64",), keep=("router", "lm_head"))
    passes = [
        plan,
        Quantize(),
        UnfreezeRouter(),
        FinetuneRouter(epochs=1, batch_size=2, validation_fraction=0.25, compile="off"),
        Emit(),
    ]
    program = aqtx.run(aqtx.trace(tmp_path / "source"), passes, calibration=ids)
    router = program.weights.get("model.layers.0.mlp.gate.weight")
    assert router.dtype == torch.float32
    assert not torch.equal(router, router.bfloat16().float())


def test_a_dtype_that_is_asked_for_holds_for_all_that_is_not_wider(tmp_path: Path) -> None:
    """A float32 checkpoint read in bf16 is bf16 as a whole: there float32 is no one's own."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("llama", **(SMALL | {"num_hidden_layers": 1}))
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    program = aqtx.trace(tmp_path, torch.bfloat16)
    assert {spec.on_disk for spec in program.weights.specs.values()} == {torch.bfloat16}


def test_a_model_in_memory_keeps_them_as_well(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    precise = publish(tmp_path, "dots1")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    program = aqtx.trace(model)
    assert [key for key, value in precise.items() if not torch.equal(program.weights.get(key), value)] == []
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
