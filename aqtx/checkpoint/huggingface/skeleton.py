"""transformers' causal language models without their weights, in a form that traces canonically.

Parameters are on meta, buffers are real (rotary frequencies are in no checkpoint), experts are
split (`experts.py`), norms are one op each (`norms.py`), LongRoPE is arithmetic (`long_rope.py`), and
`forward(ids) -> logits`.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from aqtx.checkpoint.huggingface import experts
from aqtx.checkpoint.huggingface.long_rope import traceable_long_rope
from aqtx.checkpoint.huggingface.norms import canonical_norms
from aqtx.errors import InputError, malformed


def skeleton(config: Mapping[str, Any]) -> nn.Module:
    """The model of a config.json that transformers knows, in the canonical form.

    Raises:
        InputError: transformers has no causal language model of this type.
    """
    return canonicalize(blank(config))


def blank(config: Mapping[str, Any]) -> nn.Module:
    """The same as transformers has it: parameters under its own names, experts fused.

    Raises:
        InputError: transformers has no causal language model of this type.
    """
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    kind = str(config.get("model_type"))
    if kind not in CONFIG_MAPPING:
        raise InputError(f"config.json: model_type {kind!r} is known neither to aqtx nor to transformers")
    experts.register()
    plain = {key: value for key, value in config.items() if key not in ("quantization_config", "auto_map")}
    with (
        malformed(f"config.json: transformers makes no causal language model of {kind!r}"),
        torch.device("cpu"),
        parameters_on_meta(),
    ):
        made = CONFIG_MAPPING[kind].from_dict(plain)
        model: nn.Module = AutoModelForCausalLM.from_config(made, dtype=torch.float32)
    return model.eval()


def canonicalize(model: nn.Module) -> nn.Module:
    """Split experts, unify norms, and make the forward `ids -> logits`; the model is on meta."""
    fused = [module for module in model.modules() if experts.is_fused_experts(module)]
    if fused:
        model.set_experts_implementation(experts.IMPLEMENTATION)  # type: ignore[operator]
    for module in fused:
        experts.split(module)
    canonical_norms(model)
    traceable_long_rope(model)
    for module in model.modules():
        for name in module._buffers.keys() - module._non_persistent_buffers_set:
            store_as_parameter(module, name, keeps_dtype=name.endswith("bias"))
    original = model.forward

    def score(ids: Tensor) -> Tensor:
        logits: Tensor = original(input_ids=ids, use_cache=False).logits
        return logits

    model.forward = score
    return model


def store_as_parameter(module: nn.Module, name: str, *, keeps_dtype: bool) -> None:
    """Make a buffer that checkpoints hold a weight, which is read and written.

    A router's correction bias stays in float32; anything else (MiniMax's decays) is multiplied with activations and
    comes in the model's dtype, as transformers loads it.
    """
    value = module._buffers.pop(name)
    assert value is not None
    made = nn.Parameter(value.to("meta"), requires_grad=False)
    made.keeps_dtype = keeps_dtype  # type: ignore[attr-defined]
    module.register_parameter(name, made)


def canonical_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and stored buffers of a loaded model by their canonical names; nothing is copied."""
    tensors = dict(model.state_dict(keep_vars=True))
    for name, module in model.named_modules():
        if experts.is_fused_experts(module):
            for fused in ("gate_up_proj", "up_proj", "down_proj"):
                tensors.pop(f"{name}.{fused}", None)
            tensors.update({f"{name}.{part}": value for part, value in experts.projections(module).items()})
    return tensors


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Every parameter goes to meta as it is made, so that no weight is ever allocated; buffers stay."""
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(self, name, param)
        made = self._parameters[name]
        if made is not None and not made.is_meta:
            self._parameters[name] = nn.Parameter(made.to("meta"), requires_grad=made.requires_grad)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
