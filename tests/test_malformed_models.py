"""Files of a model in a thousand malformed versions or more, by seed: used, or refused in one sentence."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

import aqtx
from aqtx.checkpoint.exports.run import export
from aqtx.checkpoint.header import read_header
from aqtx.checkpoint.open import open_program
from aqtx.checkpoint.reader import INDEX, CheckpointReader
from aqtx.errors import InputError
from aqtx.models import build, load_config
from aqtx.program.package import open_package
from aqtx.text.tokens import load_tokenizer
from tests.model_cases import CASES, SMALL
from tests.mutations import damaged, mutations, refused
from tests.tiny import OLMOE, write_checkpoint

ROUNDS = 1000
SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))]
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}


@pytest.mark.parametrize("seed", SEEDS)
def test_headers_of_safetensors(tmp_path, seed):
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(3, 4), "b": torch.zeros(5, dtype=torch.bfloat16)}, file, {"format": "pt"})
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    told = 0
    for header in mutations(json.loads(whole[8 : 8 + length]), ROUNDS, seed):
        text = json.dumps(header).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + length :])
        told += refused(read_header, file)
    assert told > 0.7 * ROUNDS
    for data in damaged(whole, ROUNDS, seed):
        file.write_bytes(data)
        refused(read_header, file)


@pytest.mark.parametrize("seed", SEEDS)
def test_indices(tmp_path, seed):
    folder = write_checkpoint(tmp_path / "source")
    keys = list(load_file(folder / "model.safetensors"))[:4]
    index = {"metadata": {"total_size": 3}, "weight_map": dict.fromkeys(keys, "model.safetensors")}

    def read(content: object) -> None:
        (folder / INDEX).write_text(json.dumps(content))
        CheckpointReader(folder)

    assert sum(refused(read, content) for content in mutations(index, ROUNDS, seed)) > 0.4 * ROUNDS


CONFIGS = {
    "olmoe": {**OLMOE, "rope_scaling": YARN, "clip_qkv": 1.0, "dtype": "bfloat16"},
    **{
        name: {"model_type": CASES[name][0], **SMALL, **CASES[name][1]}
        for name in ("qwen3-next-dense-layers", "deepseek-v2-yarn", "deepseek-v3-yarn", "gemma3", "glm4-moe-groups")
    },
    "smollm3": {"model_type": "smollm3", **SMALL, "no_rope_layers": [1, 0, 1], "layer_types": ["full_attention"] * 3},
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_configs(tmp_path, name, seed):
    def read(content: object) -> None:
        (tmp_path / "config.json").write_text(json.dumps(content))
        with torch.device("meta"):
            build(load_config(tmp_path))

    rounds = ROUNDS if name == "olmoe" else ROUNDS // 10
    assert sum(refused(read, content) for content in mutations(CONFIGS[name], rounds, seed)) > 0.4 * rounds


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """A run with rotations and rounded inputs: folder, and what its config.json holds without the digest."""
    root = tmp_path_factory.mktemp("quantized")
    plan = {"assign_plan": {"method": "uniform", "candidates": ["mxfp6"], "activations": "mxfp8"}}
    passes = [{"insert_hadamard": {"block": 32}}, plan, "quantize", "emit"]
    source = write_checkpoint(root / "source", {**OLMOE, "num_hidden_layers": 1, "num_experts": 2})
    recipe = {"version": 1, "model": {"source": str(source)}, "passes": passes, "report": False}
    aqtx.apply(recipe, output=str(root / "run"))
    config = json.loads((root / "run" / "config.json").read_text())
    del config["quantization_config"]["sha256"]
    return root / "run", config


@pytest.mark.filterwarnings("ignore:.*carries no digest")
@pytest.mark.parametrize("rounds", [8, pytest.param(ROUNDS, marks=pytest.mark.slow)])
def test_quantization_sections_that_nobody_signed(quantized, tmp_path, rounds):
    folder = tmp_path / "run"
    shutil.copytree(quantized[0], folder)

    def read(content: object) -> None:
        (folder / "config.json").write_text(json.dumps({**quantized[1], "quantization_config": content}))
        open_program(folder, None)

    cases = mutations(quantized[1]["quantization_config"], rounds)
    assert sum(refused(read, content) for content in cases) > 0.3 * rounds


@pytest.mark.parametrize("rounds", [8, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["gpt2", "mamba2", "granitemoe"])
def test_configs_of_architectures_that_transformers_makes(tmp_path, kind, rounds):
    from transformers import AutoConfig

    from aqtx.checkpoint.huggingface.skeleton import skeleton

    small = {"num_hidden_layers": 1, "n_layer": 1, "hidden_size": 64, "n_embd": 64, "n_head": 4, "vocab_size": 96}
    small |= {"intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "n_positions": 64}
    small |= {"num_heads": 8, "head_dim": 16, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}
    known = AutoConfig.for_model(kind).to_dict()
    config = {**known, **{key: value for key, value in small.items() if key in known}}
    config.pop("layer_types", None)

    def read(content: object) -> None:
        (tmp_path / "config.json").write_text(json.dumps(content))
        skeleton(load_config(tmp_path))

    assert refused(read, config) == 0
    for content in mutations(config, rounds):
        refused(read, content)


def write_tokenizer(folder: Path) -> dict[str, dict]:
    """A tokenizer of a few words, in the files of transformers."""
    words = Tokenizer(models.WordLevel({"<s>": 0, "a": 1, "b": 2, "<unk>": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.add_special_tokens(["<s>"])
    words.save(str(folder / "tokenizer.json"))
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "<s>", "add_bos_token": True}
    told |= {"model_max_length": 10, "added_tokens_decoder": {"0": {"content": "<s>", "special": True}}}
    told |= {
        "chat_template": "x",
        "extra_special_tokens": {"image_token": "<s>"},
        "auto_map": {"AutoTokenizer": ["a.b"]},
    }
    plain = {key: value for key, value in told.items() if key != "auto_map"}
    (folder / "tokenizer_config.json").write_text(json.dumps(plain))
    return {"tokenizer.json": json.loads((folder / "tokenizer.json").read_text()), "tokenizer_config.json": told}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_tokenizers(tmp_path, name, seed):
    (tmp_path / "config.json").write_text(json.dumps(OLMOE))
    files = write_tokenizer(tmp_path)
    assert load_tokenizer(tmp_path).encode("a b") == [1, 2]

    def read(content: object) -> None:
        (tmp_path / name).write_text(json.dumps(content))
        load_tokenizer(tmp_path)

    assert sum(refused(read, content) for content in mutations(files[name], ROUNDS // 2, seed)) > 0.1 * ROUNDS


@pytest.mark.parametrize("rounds", [16, pytest.param(ROUNDS, marks=pytest.mark.slow)])
def test_files_of_llama_cpp_and_packages(tmp_path, rounds):
    small = {"num_hidden_layers": 1, "num_experts": 2, "num_key_value_heads": 4, "vocab_size": 4096}
    source = write_checkpoint(tmp_path / "source", {**OLMOE, **small})
    shutil.copy(aqtx.trace("tinymoe").folder / "tokenizer.json", source)
    file = export(source, "gguf", tmp_path / "model.gguf").path
    whole, told = file.read_bytes(), 0
    for data in (b"", b"GGUF", b"GGUF" + b"\xff" * 64, *damaged(whole[:6000], rounds)):
        file.write_bytes(data + (whole[6000:] if len(data) == 6000 else b""))
        told += refused(open_program, file, None)
    assert told > rounds // 3
    for data in (b"", b"PK\x03\x04" + b"x" * 100, whole):
        file.write_bytes(data)
        assert refused(open_package, file) == 1


def test_a_plain_model_has_no_codes_to_export(tmp_path):
    with pytest.raises(InputError, match="nothing in the checkpoint is quantized"):
        export(write_checkpoint(tmp_path / "source"), "compressed-tensors", tmp_path / "out")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("text", ["null", "[]", "3", '"x"'])
def test_files_of_tokenizers_that_hold_no_object(tmp_path, name, text):
    (tmp_path / "config.json").write_text(json.dumps(OLMOE))
    write_tokenizer(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=rf"{name} holds no JSON object"):
        load_tokenizer(tmp_path)
