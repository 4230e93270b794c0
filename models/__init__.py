"""The architectures that aqtx implements itself, by the `model_type` of config.json."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aqtx.errors import InputError, malformed
from aqtx.machine.files import read_json
from aqtx.models.config_text import decoded
from aqtx.models.on_disk import text_config
from aqtx.models.sanity import nonsense

if TYPE_CHECKING:
    from aqtx.models.decoder import CausalLM

MODEL_TYPES: dict[str, tuple[str, str]] = {
    "olmoe": ("olmoe", "Olmoe"),
    "mixtral": ("mixtral", "Mixtral"),
    "qwen2_moe": ("qwen2_moe", "Qwen2Moe"),
    "deepseek": ("deepseek", "Deepseek"),
    "deepseek_v2": ("deepseek_v3", "DeepseekV3"),
    "deepseek_v3": ("deepseek_v3", "DeepseekV3"),
    "ernie4_5_moe": ("ernie4_5_moe", "Ernie45Moe"),
    "gemma3_text": ("gemma3", "Gemma3"),
    "glm4_moe": ("glm4_moe", "Glm4Moe"),
    "gpt_oss": ("gpt_oss", "GptOss"),
    "granitemoe": ("granitemoe", "GraniteMoe"),
    "qwen3_5_moe_text": ("qwen3_5_moe", "Qwen35Moe"),
    "qwen3_next": ("qwen3_next", "Qwen3Next"),
    "qwen3_moe": ("qwen3_moe", "Qwen3Moe"),
    "llama": ("llama", "Llama"),
    "mistral": ("llama", "Llama"),
    "qwen2": ("llama", "Llama"),
    "qwen3": ("llama", "Llama"),
    "smollm3": ("llama", "Llama"),
}

# Rotations that are refused, since something nonlinear stands in their way.
UNROTATED: dict[str, tuple[str, ...]] = {"gemma3_text": ("residual",)}  # norms behind attention and feed-forward


def supported(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of an architecture implemented here."""
    kind = config.get("model_type")
    return isinstance(kind, str) and kind in MODEL_TYPES


def build(config: Mapping[str, Any]) -> "CausalLM":
    """The model of a config.json, with unset weights.

    Raises:
        InputError: the architecture or one of its settings is not supported or no setting; names each.
    """
    if not supported(config):
        raise InputError(f"config.json: model_type {config.get('model_type')!r} is not one of {', '.join(MODEL_TYPES)}")
    module, name = MODEL_TYPES[config["model_type"]]
    architecture = getattr(importlib.import_module(f"aqtx.models.{module}"), name)
    with malformed(f"config.json: no {config['model_type']} can be made of it"):
        model: CausalLM = architecture.from_dict(config)
    return model


def load_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint folder; of a model that sees images too, the config of its text model."""
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder} has no config.json, so it is not a Hugging Face checkpoint")
    config = read_json(path)
    if not isinstance(config, dict):
        raise InputError(f"{path} holds no JSON object")
    with malformed(f"{path}: its sections cannot be read"):
        config = text_config(decoded(config))
    if problems := nonsense(config):
        raise InputError(*(f"{path}: {problem}" for problem in problems))
    config.pop("auto_map", None)  # names Python files beside the weights, which nothing here runs or passes on
    if config.get("quantization_config", ...) is None:  # written so by some tools: not quantized
        del config["quantization_config"]
    return config
