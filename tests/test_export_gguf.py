"""GGUF files in llama.cpp's own code: every value, the tokenizer, and the logits of each family."""

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader

import aqtx
from aqtx.checkpoint.exports.run import export
from aqtx.checkpoint.open import open_program
from aqtx.cli import main
from aqtx.errors import InputError
from aqtx.formats import dequantized
from aqtx.text.tokens import evaluation, load_tokenizer
from tests.llama_cpp import DECODERS, Model, decode
from tests.marks import slow
from tests.model_cases import oracle
from tests.quantized_folders import quantized, with_tokenizer

# one format for each type and each way of filling it
FORMATS = (
    *("int4_g32", "int4", "int3_g64", "int2_g64", "int8_g32", "int6_row", "int6", "int5", "fp6"),
    *("mxfp4", "mxfp6", "nvfp4"),
    *("q2_k", "q3_k", "q4_k", "q5_k", "q6_k"),
)
ROLES = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
ROLES |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
VOCABULARY = {"vocab_size": 3072, "bos_token_id": 0, "eos_token_id": 0}


def nll(logits: np.ndarray, ids: list[int]) -> float:
    """Nats per token."""
    rows = torch.from_numpy(logits[:-1]).double().log_softmax(-1)
    return float(-rows.gather(1, torch.tensor(ids[1:])[:, None]).mean())


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A dense model whose projections have all formats, one after the other, and its file."""
    root = tmp_path_factory.mktemp("gguf")
    wide = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": -(-len(FORMATS) // len(ROLES))}
    oracle("llama", **wide, **VOCABULARY).to(torch.bfloat16).save_pretrained(root / "source")
    with_tokenizer(root / "source")
    roles = [f"*.layers.{layer}.*.{role}" for layer in range(len(FORMATS)) for role in ROLES]
    formats = dict(zip(roles, FORMATS, strict=False))
    folder = quantized(root / "source", root / "q", formats)
    made = export(folder, "gguf", root / "model.gguf")
    assert made.clients == ("llama.cpp",) and made.checked is not None
    assert made.checked.worst < 2**-24 and made.notes == []  # NVFP4's product of three is rounded in another order
    return folder, root / "model.gguf"


def test_llama_cpp_decodes_every_value_as_ours(dense: tuple[Path, Path]) -> None:
    folder, file = dense
    program = aqtx.load(folder)
    tensors = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    kinds, unlike, heads = set(), [], {"attn_q": 4, "attn_k": 2}
    for site in program.sites():
        role = ROLES.get(site.name.rpartition(".")[2])
        if role is None or site.name not in program.config["quantization_config"]["formats"]:
            continue
        tensor = tensors[f"blk.{site.layer}.{role}.weight"]
        kinds.add(tensor.tensor_type.name)
        values = decode(tensor.data, tensor.tensor_type.name, site.numel).reshape(site.shape)
        if tensor.tensor_type.name == "NVFP4":
            values = values * tensors[tensor.name.replace(".weight", ".scale")].data
        own = program.stored(site).dequantize(torch.float32).numpy()
        if role in heads:  # llama.cpp pairs neighbouring rows, the checkpoint halves
            own = own.reshape(heads[role], 2, -1, own.shape[1]).swapaxes(1, 2).reshape(own.shape)
        # the outer scale of NVFP4 is multiplied in another order: one float32 rounding
        if not np.allclose(values, own, rtol=2**-22 if tensor.tensor_type.name == "NVFP4" else 0, atol=0):
            unlike.append(site.name)
    assert unlike == []
    k_quants = {f"Q{bits}_K" for bits in range(2, 7)}
    assert kinds == {"Q4_0", "Q5_0", "Q8_0", "MXFP4", "NVFP4"} | k_quants
    assert {kind.lower() for kind in kinds} <= {name.lower() for name in DECODERS}


def test_text_becomes_the_same_tokens(dense: tuple[Path, Path]) -> None:
    folder, file = dense
    tokenizer, model = load_tokenizer(folder), Model(file)
    for text in ("It's 1,024 bytes; don't  pad.\n\tdef f(x): return x_2", "naïve café — 東京 🙂", "<|endoftext|>A"):
        assert model.tokenize(text) == tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize(
    "name", ["llama", "olmoe", *slow("mixtral", "qwen2", "qwen3", "qwen2-moe", "qwen3-moe", "smollm3")]
)
def test_each_family_computes_our_logits(name: str, tmp_path: Path) -> None:
    """Unquantized in float32, so that only the order of sums differs.

    llama.cpp keeps keys and values in half precision: 2^-11 relative of values below 4, over 3 layers and summed with
    random signs, some 2e-3 of logits; a wrong permutation or a missing norm changes them by more than 0.1.
    """
    settings = VOCABULARY | {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    settings |= {"norm_topk_prob": True} if name == "qwen3-moe" else {}
    settings |= {"num_key_value_heads": 4} if name == "olmoe" else {}
    settings |= {"no_rope_layer_interval": 4, "num_hidden_layers": 4} if name == "smollm3" else {}
    model = oracle(name, **settings)
    model.save_pretrained(tmp_path / "source")
    file = export(with_tokenizer(tmp_path / "source"), "gguf", tmp_path / "model.gguf").path
    ids = torch.randint(1, 3072, (24,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.no_grad():
        own = aqtx.load(tmp_path / "source").module()(torch.tensor([ids]))[0].numpy()
    assert np.abs(Model(file).logits(ids) - own).max() < 0.02


def test_the_shipped_model_scores_text_as_ours(tmp_path: Path) -> None:
    """2,000 tokens, experts of each projection in a format of its own; llama.cpp rounds inputs to 8 bits."""
    formats = {"*.gate_proj": "int4_g32", "*.up_proj": "mxfp4", "*.down_proj": "int8_g32", "*.v_proj": "int6_row"}
    folder = quantized("tinymoe", tmp_path / "q", formats)
    model = Model(export(folder, "gguf", tmp_path / "model.gguf").path)
    documents = evaluation("builtin", load_tokenizer(folder), max_tokens=12_000)
    windows = [document.ids[:500].tolist() for document in documents if len(document.ids) >= 500][:4]
    module, ours, theirs = aqtx.load(folder).module(), [], []
    for ids in windows:
        theirs.append(nll(model.logits(ids), ids))
        with torch.no_grad():
            ours.append(nll(module(torch.tensor([ids]))[0].float().numpy(), ids))
    assert len(windows) == 4 and abs(np.mean(theirs) - np.mean(ours)) < 0.01


@pytest.mark.parametrize(
    ("formats", "says"),
    [
        ({"*.experts.*": "mxfp8"}, r"gguf has no form for mxfp8_e4m3 in rows of 256: 128 matrices.* is int8"),
        ({"*.down_proj": "q4_k"}, r"gguf has no form for q4_k in rows of 128: 64 .* is mxfp4$"),
        ({"*.experts.*": "nvfp4"}, r"llama.cpp has no form for nvfp4 .*computes NaN"),
        ({"*.experts.3.*": "int4"}, r"experts of a layer and projection are one tensor"),
    ],
)
def test_what_llama_cpp_would_not_load_is_refused(formats: dict[str, str], says: str, tmp_path: Path) -> None:
    folder = quantized("tinymoe", tmp_path / "q", formats)
    with pytest.raises(InputError, match=says):
        export(folder, "gguf", tmp_path / "model.gguf")
    assert not list(tmp_path.glob("model*"))


def test_exports_are_arms_of_an_evaluation(tmp_path: Path) -> None:
    """Decoded, they are the quantized model: the same values in plain matrices, so the same logits."""
    formats = {"*.experts.*": "int4_g32"}
    folder = quantized("tinymoe", tmp_path / "q", formats)
    ids = torch.tensor([[5, 6, 7, 8]])
    own = aqtx.load(folder)
    for to, name in (("gguf", "model.gguf"), ("compressed-tensors", "model")):
        arm = open_program(export(folder, to, tmp_path / name).path, None)
        unlike = [
            key
            for key in own.weights.names()
            if not torch.equal(arm.weights.get(key), dequantized(own.weights.get(key)))
        ]
        assert unlike == [] and arm.folder is not None and (arm.folder / "tokenizer.json").is_file()
        with torch.no_grad():
            assert arm.module()(ids).isfinite().all()
    assert main(["eval", f"a={folder}", f"b={tmp_path / 'model.gguf'}", "--max-tokens", "300"]) == 0
