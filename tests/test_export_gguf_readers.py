"""GGUF files in use: generated text, metadata from a template, and readers that are not llama.cpp."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader

import aqtx
from aqtx.checkpoint.exports.run import export
from aqtx.errors import InputError
from aqtx.program.generate import Generator
from aqtx.text.tokens import load_tokenizer
from tests.llama_cpp import Model
from tests.model_cases import oracle
from tests.quantized_folders import TOKENIZER_FILES, quantized, with_tokenizer

SIZES = {"vocab_size": 3072, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
IDS = torch.randint(1, 3072, (24,), generator=torch.Generator().manual_seed(0)).tolist()
OPENVINO = os.environ.get("AQTX_OPENVINO_PYTHON")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A dense model in float32, and its file."""
    root = tmp_path_factory.mktemp("llama")
    oracle("llama", **SIZES, bos_token_id=0, eos_token_id=0).save_pretrained(root / "source")
    return root / "source", export(with_tokenizer(root / "source"), "gguf", root / "base.gguf").path


def own_logits(folder: Path) -> np.ndarray:
    with torch.no_grad():
        return aqtx.load(folder).module()(torch.tensor([IDS]))[0].float().numpy()


@pytest.mark.slow
def test_llama_cpp_writes_the_text_that_we_write(tmp_path: Path) -> None:
    """A quantized model, its values in float32, so that llama.cpp rounds no inputs: 32 tokens after a prompt."""
    folder = quantized("tinymoe", tmp_path / "q", {"*.experts.*": "int3", "*.self_attn.*": "q4_k"})
    plain = export(folder, "dequantized", tmp_path / "plain", dtype=torch.float32).path
    file = export(plain, "gguf", tmp_path / "model.gguf").path
    prompt = load_tokenizer(folder).encode("The king said to the people of the land that", add_special_tokens=False)
    made = Model(file).continue_greedily(prompt, 32)
    assert [made] == Generator(aqtx.load(plain)).continue_greedily([prompt], max_new_tokens=32)


def test_a_template_gives_metadata_and_tokenizer(llama: tuple[Path, Path], tmp_path: Path) -> None:
    """A folder whose own tokenizer GGUF cannot tell: that of the template is taken, with its metadata."""
    source, base = llama
    folder = tmp_path / "source"
    folder.mkdir()
    for file in source.iterdir():
        if file.name not in TOKENIZER_FILES:
            (folder / file.name).write_bytes(file.read_bytes())
    with pytest.raises(InputError, match="--template"):
        export(folder, "gguf", tmp_path / "none.gguf")
    file = export(folder, "gguf", tmp_path / "model.gguf", template=base).path
    started = ("llama.", "tokenizer.")
    fields = [{name for name in GGUFReader(each).fields if name.startswith(started)} for each in (base, file)]
    assert fields[0] == fields[1]
    model = Model(file)
    assert np.abs(model.logits(IDS) - own_logits(folder)).max() < 0.02  # keys and values in half precision
    text = "It's 1,024 bytes; naïve café"
    assert model.tokenize(text) == load_tokenizer(source).encode(text, add_special_tokens=False)


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"num_hidden_layers": 1}, r"block_count .*2.* 1"), ({"hidden_size": 32}, r"embedding_length .*64.* 32")],
)
def test_a_template_of_another_model_is_refused(
    changes: dict, says: str, llama: tuple[Path, Path], tmp_path: Path
) -> None:
    oracle("llama", **SIZES | changes).save_pretrained(tmp_path / "source")
    with pytest.raises(InputError, match=says):
        export(tmp_path / "source", "gguf", tmp_path / "model.gguf", template=llama[1])
    assert not (tmp_path / "model.gguf").exists()


def test_a_template_of_an_architecture_that_is_stored_otherwise_is_refused(tmp_path: Path) -> None:
    """Gemma's norms are stored plus one there, so that names alone would give a file of another model."""
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "gemma.gguf", "gemma3")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    oracle("gemma3", **SIZES | {"num_hidden_layers": 3}).save_pretrained(tmp_path / "source")
    with pytest.raises(InputError, match="gemma3"):
        export(tmp_path / "source", "gguf", tmp_path / "model.gguf", template=tmp_path / "gemma.gguf")


def test_transformers_reads_a_file(tmp_path: Path) -> None:
    """Its own reader of GGUF: metadata, names, permuted rows and types are what it expects, and logits are ours."""
    from transformers import AutoModelForCausalLM

    wide = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2}
    oracle("llama", **SIZES | wide, bos_token_id=0, eos_token_id=0).to(torch.float16).save_pretrained(tmp_path / "s")
    formats = {"*.q_proj": "q4_k", "*.k_proj": "int4_g32", "*.gate_proj": "q6_k", "*.up_proj": "q3_k"}
    formats |= {"*.down_proj": "int5"}
    folder = quantized(with_tokenizer(tmp_path / "s"), tmp_path / "q", formats)
    file = export(folder, "gguf", tmp_path / "out" / "model.gguf").path
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    plain = aqtx.load(export(folder, "dequantized", tmp_path / "plain", dtype=torch.float32).path)
    with torch.no_grad():
        ours, found = plain.module()(torch.tensor([IDS])), theirs(torch.tensor([IDS])).logits
    torch.testing.assert_close(found, ours, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(OPENVINO is None, reason="AQTX_OPENVINO_PYTHON names no environment with openvino-genai")
def test_openvino_writes_the_text_that_we_write(tmp_path: Path) -> None:
    """OpenVINO GenAI reads F16, Q4_0 and Q8_0: ten greedy tokens in float32, no inputs rounded."""
    sizes = SIZES | {"hidden_size": 256, "intermediate_size": 256}
    oracle("llama", **sizes, bos_token_id=0, eos_token_id=0).to(torch.float16).save_pretrained(tmp_path / "source")
    folder = quantized(with_tokenizer(tmp_path / "source"), tmp_path / "q", {"*_proj": "int4_g32"})
    file = export(folder, "gguf", tmp_path / "model.gguf").path
    script = (
        "import json, sys, numpy, openvino, openvino_genai as g\n"
        "exact = dict(INFERENCE_PRECISION_HINT='f32', KV_CACHE_PRECISION='f32', DYNAMIC_QUANTIZATION_GROUP_SIZE=0)\n"
        "pipe = g.LLMPipeline(sys.argv[1], 'CPU', **exact)\n"
        "ids = openvino.Tensor(numpy.array([json.loads(sys.argv[2])]))\n"
        "made = pipe.generate(ids, max_new_tokens=10, do_sample=False, ignore_eos=True, apply_chat_template=False)\n"
        "print(json.dumps(made.tokens[0]))\n"
    )
    command = [str(OPENVINO), "-c", script, str(file), json.dumps(IDS)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr[-2000:]
    plain = aqtx.load(export(folder, "dequantized", tmp_path / "plain", dtype=torch.float32).path)
    [ours] = Generator(plain).continue_greedily([IDS], max_new_tokens=10)
    assert json.loads(done.stdout.splitlines()[-1]) == ours
