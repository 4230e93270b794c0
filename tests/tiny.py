"""Small random checkpoints for the tests, in the layout of the hub: one tensor per expert and projection."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from aqtx.models import build

OLMOE = {
    "model_type": "olmoe",
    "architectures": ["OlmoeForCausalLM"],
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 192,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}


def random_model(config: dict = OLMOE, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.nn.Module:
    """A model of ours with Gaussian weights and gains near 1."""
    generator = torch.Generator().manual_seed(seed)
    model = build(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.08 * noise if parameter.dim() > 1 else 1 + 0.1 * noise)
            parameter.data = parameter.data.to(dtype)
    return model


def hub_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The model's weights under the names of the hub."""
    tensors: dict[str, torch.Tensor] = {}
    for name, value in model.state_dict().items():
        if ".experts." in name and value.dim() == 3:
            prefix, _, projection = name.rpartition(".")
            tensors.update({f"{prefix}.{e}.{projection}.weight": matrix.clone() for e, matrix in enumerate(value)})
        else:
            tensors[name] = value.clone()
    return tensors


def write_checkpoint(folder: Path, config: dict = OLMOE, **changes: torch.Tensor) -> Path:
    """A checkpoint folder of a random model; `changes` replaces tensors by hub name."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = hub_tensors(random_model(config)) | changes
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    return folder
