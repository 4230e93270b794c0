"""GGUF files of families that llama.cpp stores otherwise than their checkpoints do: its logits, values, refusals."""

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import aqtx
from aqtx.checkpoint.exports.clients import CLIENTS
from aqtx.checkpoint.exports.gguf_families import FAMILIES
from aqtx.checkpoint.exports.run import export
from aqtx.checkpoint.exports.target import Matrix
from aqtx.checkpoint.open import open_program
from aqtx.errors import InputError
from aqtx.formats.table import parse
from aqtx.models import MODEL_TYPES
from aqtx.models.on_disk import text_config
from aqtx.passes.assign_plan import AssignPlan
from tests.gguf_cases import ALL, CASE_OF, SIZES, SWITCHES, TIED, ids_of, made, save_own
from tests.llama_cpp import Model
from tests.marks import slow_but
from tests.model_cases import CASES, LLAMA3, YARN, oracle
from tests.quantized_folders import quantized, with_tokenizer
from tests.test_export_gguf import nll
from tests.test_models_deepseek import CONFIG as DEEPSEEK
from tests.true_configs import TRUE_CONFIGS

QUICK = ("qwen3_5_moe_text", "gpt_oss", "deepseek_v3")  # linear attention, sinks and biases, latent attention


@pytest.mark.parametrize("case", slow_but(QUICK, [*CASE_OF, *SWITCHES]))
def test_llama_cpp_computes_our_logits(case: str, tmp_path: Path) -> None:
    """In float32, as `test_export_gguf.py` has it: keys and values in half precision leave some 2e-3.

    The file read back holds the same weights, but for two roundings where 1 or a logarithm was added and taken away.
    """
    made(case, tmp_path / "source")
    same_logits(tmp_path / "source", tmp_path / "model.gguf")


def same_logits(source: Path, output: Path) -> None:
    """Of a folder and of its file in llama.cpp, and the same weights in both."""
    file = export(source, "gguf", output).path
    program, back, ids = aqtx.load(source), open_program(file, None), ids_of(24)
    with torch.no_grad():
        own = program.module()(torch.tensor([ids]))[0].numpy()
    assert np.abs(Model(file).logits(ids) - own).max() < 0.02
    for name in program.weights.names():
        torch.testing.assert_close(back.weights.get(name), program.weights.get(name), rtol=2**-21, atol=2**-22)


def test_deepseek_of_which_transformers_has_no_class(tmp_path: Path) -> None:
    save_own(DEEPSEEK | SIZES | {"dtype": "float32"}, tmp_path / "source")
    same_logits(tmp_path / "source", tmp_path / "model.gguf")


def test_every_family_is_tested() -> None:
    before = {"llama", "mistral", "mixtral", "qwen2", "qwen3", "smollm3", "olmoe", "qwen2_moe", "qwen3_moe", "deepseek"}
    assert {CASES[name][0] for name, _ in CASE_OF.values()} | before == FAMILIES.keys() == MODEL_TYPES.keys()


REFUSALS = [
    ("qwen3_next", {"mlp_only_layers": [0]}, "mlp_only_layers"),
    ("qwen3_next", {"attention_bias": True}, "attention_bias"),
    ("qwen3_next", {"norm_topk_prob": False}, "norm_topk_prob None or True"),
    ("qwen3_next", {"linear_value_head_dim": 8}, "keys as wide as values"),
    ("qwen3_5_moe_text", {"layer_types": ["full_attention", "linear_attention"]}, "attention in every so-manieth"),
    ("gpt_oss", {"swiglu_limit": 0.3}, "swiglu_limit"),
    ("gpt_oss", {"attention_bias": False}, "attention_bias"),
    ("gpt_oss", TIED, "tie_word_embeddings"),
    ("gpt_oss", {"layer_types": ["full_attention"] * 2}, "a layer with a sliding window"),
    ("gpt_oss", {"layer_types": ["full_attention", "sliding_attention"]}, "full attention in every so-manieth"),
    ("deepseek_v2", {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}, "by its two best"),
    ("deepseek_v3", {"rope_interleave": False}, "rope_interleave"),
    ("deepseek_v3", {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.7}}, "mscale and mscale_all_dim"),
    ("deepseek_v3", {"num_hidden_layers": 26}, "26 or 27 layers"),
    ("gemma3_text", {"query_pre_attn_scalar": 16}, "query_pre_attn_scalar 24"),
    ("gemma3_text", {"attention_bias": True}, "attention_bias"),
    ("ernie4_5_moe", {"use_bias": True}, "use_bias"),
    ("ernie4_5_moe", {"num_hidden_layers": 4, "moe_layer_end_index": 2}, "up to the last layer"),
    ("smollm3 by its list", {"no_rope_layers": None}, "all but every fourth layer"),
    (
        "smollm3 by its list",
        {"no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 0, 1]},
        "all but every fourth layer",
    ),
    ("glm4_moe", {"rope_parameters": LLAMA3 | {"partial_rotary_factor": 0.5}}, "no rotary variant 'llama3'"),
]


@pytest.mark.parametrize(("case", "settings", "says"), slow_but(REFUSALS[::4], REFUSALS))
def test_what_llama_cpp_computes_otherwise_is_refused(
    case: str, settings: dict[str, Any], says: str, tmp_path: Path
) -> None:
    """In one sentence, by an export and by a plan for llama.cpp before it begins."""
    made(case, tmp_path / "source", **settings)
    with pytest.raises(InputError, match=says) as refused:
        export(tmp_path / "source", "gguf", tmp_path / "model.gguf")
    assert len(refused.value.problems) == 1
    assert not (tmp_path / "model.gguf").exists()
    plan = AssignPlan(method="uniform", candidates=("int4_g32",), target="llama.cpp")
    told = plan.misfits(open_program(tmp_path / "source", None, config_only=True))
    assert f"target llama.cpp: {refused.value.problems[0]}" in told


WIDE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 64}
WIDE |= {"shared_expert_intermediate_size": 64, "linear_key_head_dim": 64, "linear_value_head_dim": 64, "head_dim": 64}
WIDE |= {"query_pre_attn_scalar": 64, "max_position_embeddings": 512}
LATENT = {"q_lora_rank": 64, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32}
CODES = {
    "*.experts.*.up_proj": "mxfp4",
    "*.experts.*.gate_proj": "int4_g32",
    "*.experts.*.down_proj": "int8_g32",
    "*.shared_expert*.*_proj": "int5_g32",
    "*.linear_attn.*_proj*": "nvfp4",
    "*.self_attn.[qk]*_proj*": "int8_g32",
    "*.self_attn.o_proj": "nvfp4",
    "*.layers.[01].mlp.gate_proj": "int6_g32",
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASE_OF)
def test_codes_score_as_ours(case: str, tmp_path: Path) -> None:
    """2,000 tokens of a bf16 model with codes everywhere; llama.cpp rounds inputs of codes to 8 bits."""
    name, own = ALL[case]
    sizes = SIZES | own | WIDE | (LATENT if case.startswith("deepseek") else {})
    oracle(name, **sizes).to(torch.bfloat16).save_pretrained(tmp_path / "source")
    sites = [site.name for site in aqtx.trace(with_tokenizer(tmp_path / "source")).sites()]
    codes = {pattern: fmt for pattern, fmt in CODES.items() if any(fnmatchcase(site, pattern) for site in sites)}
    if case == "qwen3_next":  # whose linear attention llama.cpp gives no outer scale
        codes["*.linear_attn.*_proj*"] = "int4_g64"
    folder = quantized(tmp_path / "source", tmp_path / "q", codes)
    model = Model(export(folder, "gguf", tmp_path / "model.gguf").path)
    values = export(folder, "dequantized", tmp_path / "plain", dtype=torch.float32).path
    module, ids, scores = aqtx.load(values).module(), ids_of(2000), []
    for start in range(0, 2000, 500):
        window = ids[start : start + 500]
        with torch.no_grad():
            ours = nll(module(torch.tensor([window]))[0].numpy(), window)
        scores.append((nll(model.logits(window), window), ours))
    theirs, ours = np.mean(scores, axis=0)
    assert abs(theirs - ours) < 0.01


@pytest.mark.parametrize(
    ("model", "site", "fmt", "says"),
    [
        ("Qwen3.5-35B-A3B", "linear_attn.out_proj", "q4_k", "in runs of 128"),
        ("Qwen3.5-35B-A3B", "linear_attn.out_proj", "int4_g128", None),
        ("Qwen3.5-35B-A3B", "linear_attn.in_proj_z", "q4_k", None),
        ("Qwen3.5-35B-A3B", "linear_attn.out_proj", "nvfp4", None),
        ("Qwen3-Next-80B-A3B", "linear_attn.out_proj", "q4_k", None),
        ("Qwen3-Next-80B-A3B", "linear_attn.out_proj", "nvfp4", "qwen3next loads no outer scale"),
        ("DeepSeek-V3", "self_attn.q_b_proj", "nvfp4", "deepseek2 loads no outer scale"),
        ("GLM-4.5-Air", "mlp.shared_experts.up_proj", "nvfp4", "glm4moe loads no outer scale"),
        ("GLM-4.5-Air", "self_attn.q_proj", "nvfp4", None),
    ],
)
def test_plans_and_exports_know_what_llama_cpp_reads(model: str, site: str, fmt: str, says: str | None) -> None:
    """As its own code has it; where a scale is not read, values are those of another model or NaN."""
    matrix = Matrix(f"model.layers.2.{site}", 4096, text_config(TRUE_CONFIGS[model]))
    found = CLIENTS["llama.cpp"].refuses(parse(fmt), matrix)
    assert found is None if says is None else says in str(found)
