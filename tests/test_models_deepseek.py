"""DeepSeek-MoE v1 against the architecture written down a second time, token by token in float64.

`transformers` has no class for it. The restatement follows arXiv 2401.06066 and the meaning of the
fields of its config.json: no batching, no sorting, no stacked experts, rotations as complex numbers.
"""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from aqtx.models.deepseek import Deepseek
from aqtx.program.names import NamesTable
from tests.model_cases import randomize, token_ids

Array = NDArray[np.float64]
CONFIG: dict[str, Any] = {
    "model_type": "deepseek",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 80,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}


class Restatement:
    """The published architecture over tensors by their names on disk."""

    def __init__(self, config: dict[str, Any], weights: dict[str, Array]) -> None:
        self.config, self.weights = config, weights

    def logits(self, ids: list[int]) -> Array:
        stream = [self.weights["model.embed_tokens.weight"][token] for token in ids]
        for layer in range(self.config["num_hidden_layers"]):
            at = f"model.layers.{layer}."
            normed = [self.norm(x, at + "input_layernorm") for x in stream]
            stream = [x + y for x, y in zip(stream, self.attention(normed, at + "self_attn."), strict=True)]
            normed = [self.norm(x, at + "post_attention_layernorm") for x in stream]
            stream = [x + self.feed_forward(y, layer) for x, y in zip(stream, normed, strict=True)]
        return np.stack([self.weights["lm_head.weight"] @ self.norm(x, "model.norm") for x in stream])

    def norm(self, x: Array, name: str) -> Array:
        return self.weights[name + ".weight"] * x / np.sqrt(np.mean(x**2) + self.config["rms_norm_eps"])

    def linear(self, x: Array, name: str) -> Array:
        bias = self.weights.get(name + ".bias")
        return self.weights[name + ".weight"] @ x + (0.0 if bias is None else bias)

    def rotate(self, head: Array, place: int) -> Array:
        half = len(head) // 2
        turns = np.exp(1j * place * self.config["rope_theta"] ** (-np.arange(half) / half))
        turned = (head[:half] + 1j * head[half:]) * turns
        return np.concatenate([turned.real, turned.imag])

    def attention(self, xs: list[Array], at: str) -> list[Array]:
        heads, groups = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        q = [[self.rotate(h, t) for h in np.split(self.linear(x, at + "q_proj"), heads)] for t, x in enumerate(xs)]
        k = [[self.rotate(h, t) for h in np.split(self.linear(x, at + "k_proj"), groups)] for t, x in enumerate(xs)]
        v = [np.split(self.linear(x, at + "v_proj"), groups) for x in xs]
        out = []
        for t in range(len(xs)):
            read = []
            for head in range(heads):
                group = head * groups // heads
                scores = np.array([q[t][head] @ k[s][group] for s in range(t + 1)]) / np.sqrt(len(q[t][head]))
                shares = np.exp(scores - scores.max())
                read.append(sum(w * v[s][group] for s, w in enumerate(shares / shares.sum())))
            out.append(self.linear(np.concatenate(read), at + "o_proj"))
        return out

    def expert(self, x: Array, name: str) -> Array:
        gate = self.linear(x, name + ".gate_proj")
        return self.linear(gate / (1 + np.exp(-gate)) * self.linear(x, name + ".up_proj"), name + ".down_proj")

    def feed_forward(self, x: Array, layer: int) -> Array:
        at, config = f"model.layers.{layer}.mlp", self.config
        if layer < config["first_k_dense_replace"] or layer % config["moe_layer_freq"]:
            return self.expert(x, at)
        scores = np.exp(self.linear(x, at + ".gate"))
        scores = scores / scores.sum()
        chosen = sorted(range(len(scores)), key=lambda e: -scores[e])[: config["num_experts_per_tok"]]
        total = sum(scores[e] for e in chosen) if config["norm_topk_prob"] else 1.0
        out = sum(scores[e] / total * self.expert(x, f"{at}.experts.{e}") for e in chosen)
        return out + self.expert(x, at + ".shared_experts") if config["n_shared_experts"] else out


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"norm_topk_prob": True, "first_k_dense_replace": 0},
        {"moe_layer_freq": 2, "n_shared_experts": None, "attention_bias": True},
    ],
    ids=["published", "normalised", "no-shared"],
)
def test_logits_equal_the_restatement(settings: dict[str, Any]) -> None:
    config = CONFIG | settings
    model = Deepseek.from_dict(config).eval()
    randomize(model)
    table = NamesTable({name: tuple(parameter.shape) for name, parameter in model.named_parameters()})
    weights: dict[str, Array] = {}
    for name, parameter in model.named_parameters():
        keys = table.to_disk[name]
        parts = parameter.detach() if len(keys) > 1 else parameter.detach()[None]
        weights |= {key: part.double().numpy() for key, part in zip(keys, parts, strict=True)}
    ids = token_ids(1, 11)
    expected = torch.from_numpy(Restatement(config, weights).logits(ids[0].tolist()))
    with torch.no_grad():
        difference = (model(ids)[0] - expected).abs().max().item()
    assert expected.std() > 0.1
    assert difference <= 4e-6  # float32 against doubles; how sums are ordered differs by processor


def test_shared_experts_lie_where_the_hub_has_them() -> None:
    names = {name for name, _ in Deepseek.from_dict(CONFIG).named_parameters()}
    assert {
        "model.layers.0.mlp.gate_proj.weight",  # the first layer is dense
        "model.layers.1.mlp.gate.weight",
        "model.layers.1.mlp.experts.gate_proj",
        "model.layers.1.mlp.shared_experts.down_proj.weight",
    } <= names
