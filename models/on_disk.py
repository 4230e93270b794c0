"""How published checkpoints of a family differ from its model here: parts left out, sections of config.json, and
experts that tools know in one tensor a layer only.

Reading follows transformers' own tables (`aqtx.checkpoint.huggingface.layout`); what is here says what to do without,
and how to write.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Fused:
    """A tensor that holds one matrix, or gate and up, of all experts of a layer.

    Fields:
        name: of the tensor, behind the name of the module that has router and experts.
        parts: the projections it holds.
        transposed: [E, K, parts * N] instead of [E, parts * N, K].
        interleaved: rows of the parts lie in turn, not one part behind the other.
    """

    name: str
    parts: tuple[str, ...]
    transposed: bool = False
    interleaved: bool = False

    def whole_shape(self, experts: int, matrix: Shape) -> Shape:
        """The tensor's shape, from that of one expert's matrix."""
        rows, columns = len(self.parts) * matrix[0], matrix[1]
        return (experts, columns, rows) if self.transposed else (experts, rows, columns)


@dataclass(frozen=True)
class Place:
    """The part of a tensor that is one expert's matrix [N, K]."""

    key: str  # of the tensor on disk
    expert: int
    rule: Fused
    part: int

    def view(self, whole: Tensor) -> Tensor:
        """The matrix in the tensor."""
        matrix = whole[self.expert].t() if self.rule.transposed else whole[self.expert]
        if len(self.rule.parts) == 1:
            return matrix
        if self.rule.interleaved:
            return matrix[self.part :: len(self.rule.parts)]
        return matrix.chunk(len(self.rule.parts))[self.part]


GATE_UP = ("gate_proj", "up_proj")
ALWAYS_FUSED: dict[str, tuple[Fused, ...]] = {  # transformers reads no single experts of these
    "gpt_oss": (
        Fused("experts.gate_up_proj", GATE_UP, transposed=True, interleaved=True),
        Fused("experts.down_proj", ("down_proj",), transposed=True),
    ),
    "granitemoe": (Fused("input_linear.weight", GATE_UP), Fused("output_linear.weight", ("down_proj",))),
}
RENAMED: dict[str, tuple[tuple[str, str], ...]] = {  # beside what transformers' own tables say
    "gemma3_text": (
        (r"^model\.language_model\.", "model."),
        (r"^language_model\.model\.", "model."),
        (r"^language_model\.lm_head\.", "lm_head."),
    ),
}
LEFT_OUT = {
    "qwen3_next": r"mtp\.",
    "qwen3_5_moe_text": r"mtp\.|(model\.)?visual\.",
    "gemma3_text": r"(model\.)?(vision_tower|multi_modal_projector)\.",
}
# A whole model's config.json -> what the section of its text model leaves to transformers' defaults.
NESTED: dict[str, dict[str, Any]] = {
    "qwen3_5_moe": {"model_type": "qwen3_5_moe_text", "architectures": ["Qwen3_5MoeForCausalLM"]},
    "gemma3": {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "vocab_size": 262208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
    },
}
_OUTER = ("dtype", "torch_dtype", "tie_word_embeddings", "quantization_config", "eos_token_id", "transformers_version")


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the text model alone, where config.json is of a model that sees images too."""
    kind, text = config.get("model_type"), config.get("text_config")
    if kind not in NESTED or not isinstance(text, Mapping):
        return dict(config)
    outer = {key: config[key] for key in _OUTER if config.get(key) is not None}
    return NESTED[str(kind)] | outer | dict(text)


def left_out(config: Mapping[str, Any], key: str) -> bool:
    """Whether a tensor of a checkpoint belongs to what its architecture here does without.

    DeepSeek-V3 and GLM-4.5 keep layers that predict several tokens at once behind the last one, Qwen3-Next apart; a
    model that sees images has a tower for them.
    """
    kind = config.get("model_type")
    if kind in LEFT_OUT:
        return re.match(LEFT_OUT[kind], key) is not None
    found = re.match(r"model\.layers\.(\d+)\.", key)
    behind = found is not None and int(found[1]) >= int(config.get("num_hidden_layers") or 0)
    return behind and kind in ("deepseek_v3", "glm4_moe")


def renamed(config: Mapping[str, Any], key: str) -> str:
    """The name in the text model of a tensor of one that sees images too."""
    for pattern, name in RENAMED.get(str(config.get("model_type")), ()):
        key = re.sub(pattern, name, key)
    return key


def place(config: Mapping[str, Any], name: str) -> Place | None:
    """Where a family that only has fused experts keeps one expert's matrix; None for any other tensor."""
    found = re.fullmatch(r"(.*\.)experts\.(\d+)\.([^.]+)\.weight", name)
    rules = ALWAYS_FUSED.get(str(config.get("model_type")), ())
    for rule in rules if found is not None else ():
        assert found is not None
        if found[3] in rule.parts:
            return Place(found[1] + rule.name, int(found[2]), rule, rule.parts.index(found[3]))
    return None
