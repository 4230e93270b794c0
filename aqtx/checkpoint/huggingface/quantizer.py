"""Loading a checkpoint of ours through `transformers.AutoModelForCausalLM.from_pretrained`.

transformers builds its model on meta, then asks a quantizer to prepare it. Ours takes out the
parameters that are stored as codes, so that nothing is allocated for them; transformers loads the
rest; then the codes are put in as tensor subclasses, which linears and `aqtx.grouped_linear` run.
The ops of structural edits (rotations, quantized activations) become pre-hooks.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from aqtx.checkpoint.checks import DIGEST, UNAWARE, WHY, check_version
from aqtx.checkpoint.huggingface import experts
from aqtx.checkpoint.huggingface.inputs import InputOps
from aqtx.checkpoint.huggingface.names import from_disk, to_disk
from aqtx.checkpoint.reader import CheckpointReader
from aqtx.checkpoint.source import CheckpointSource
from aqtx.errors import InputError
from aqtx.formats.decode import PARTS
from aqtx.program.edits import Edit, edit_from_json
from aqtx.program.names import stacked_name

METHOD = "aqtx"


@register_quantization_config(METHOD)
class AqtxConfig(QuantizationConfigMixin):
    """`quantization_config` of config.json: the format of each quantized site, and structural edits."""

    def __init__(
        self, *, formats: dict[str, str], edits: list[dict[str, Any]], layout_version: int, **other: Any
    ) -> None:
        told = {"layout_version": layout_version, "formats": formats, "edits": edits, DIGEST: other.get(DIGEST)}
        check_version(told, "config.json: quantization_config")
        self.quant_method = METHOD  # type: ignore[assignment]
        self.formats, self.edits, self.layout_version = formats, edits, layout_version
        self.__dict__.update(other)


@register_quantizer(METHOD)
class AqtxQuantizer(HfQuantizer):
    """Swaps codes in for parameters; a checkpoint that is loaded so cannot be trained or saved again."""

    requires_calibration = True
    quantization_config: AqtxConfig

    def is_serializable(self) -> bool:
        """No: copy the folder instead."""
        return False

    @property
    def is_trainable(self) -> bool:
        """No: codes have no gradient."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Whether `torch.compile` runs the loaded model: yes."""
        return True

    def update_attn_implementation(self, config: Any) -> Any:
        """The config before files are looked for: whoever comes here knows how to read ours."""
        if getattr(config, UNAWARE, None) == WHY:
            delattr(config, UNAWARE)
        return config

    update_tp_plan = update_attn_implementation  # what transformers 5.23 asks with a config

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        """Take out what is stored as codes, so that transformers neither allocates nor looks for it."""
        self.kind = model.config.model_type
        self.dtype: torch.dtype = next(model.parameters()).dtype
        self.folder = Path(kwargs["checkpoint_files"][0]).parent
        self.shapes: dict[str, tuple[int, ...]] = {}  # by name on disk, of what `put_in` will read
        stacked = [site for site in self.quantization_config.formats if stacked_name(f"{site}.weight")]
        if stacked or any(".experts." in edit.weight for edit in map(edit_from_json, self.quantization_config.edits)):
            experts.register()
            model.set_experts_implementation(experts.IMPLEMENTATION)
            for name, module in model.named_modules():
                if experts.is_fused_experts(module):
                    parts = experts.projections(module)
                    experts.take_out(module)
                    for part in ("gate_up_proj", *parts):
                        _set_aside(module, part)
                    self.shapes.update(
                        {self._disk(f"{name}.{part}"): tuple(value.shape) for part, value in parts.items()}
                    )
        for site in self.quantization_config.formats.keys() - set(stacked):
            module = _module(model, from_disk(self.kind, site))
            self.shapes[f"{site}.weight"] = tuple(module.weight.shape)
            _set_aside(module, "weight")
        known = set(model._keys_to_ignore_on_load_unexpected or ())
        model._keys_to_ignore_on_load_unexpected = known | {rf"\.({'|'.join(PARTS)})$", r"\.experts\.\d+\."}

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Without those that fuse experts, where they are not fused."""
        if not any(len(shape) == 3 for shape in self.shapes.values()):
            return weight_conversions
        return [rule for rule in weight_conversions if not any("experts" in text for text in rule.target_patterns)]

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Put the codes in, and the ops of edits before the linears that they name."""
        source = CheckpointSource(CheckpointReader(self.folder), self.quantization_config.formats, self.dtype)
        source.shapes = self.shapes
        device = next(model.parameters()).device
        for name in self.shapes:
            owner, _, leaf = from_disk(self.kind, name).rpartition(".")
            value, module = source.parameter(name).to(device), model.get_submodule(owner)
            for blank in ("gate_up_proj", leaf):
                module.__dict__.pop(blank, None)
            module.register_parameter(leaf, nn.Parameter(value, requires_grad=False))
        edits: dict[str, list[Edit]] = {}
        for edit in map(edit_from_json, self.quantization_config.edits):
            edits.setdefault(from_disk(self.kind, edit.weight), []).append(edit)
        for name, found in edits.items():
            put_before(model, name, InputOps(found, self.dtype).to(device))
        return model

    def _disk(self, name: str) -> str:
        return to_disk(self.kind, name)


def _set_aside(module: nn.Module, name: str) -> None:
    """In place of a parameter something empty, which loading does not see and initialization passes over.

    Some modules initialize the weights of others (a router its `gate.weight`) and would stumble over None.
    """
    blank = torch.empty(0)
    blank._is_hf_initialized = module._is_hf_initialized = True  # type: ignore[attr-defined, assignment]
    module._parameters.pop(name, None)
    module.__dict__[name] = blank


def put_before(model: nn.Module, weight: str, ops: InputOps) -> None:
    """Let the linear, or the projection of fused experts, that holds `weight` read its input through `ops`."""
    owner, _, leaf = weight.rpartition(".")
    module = model.get_submodule(owner)
    if experts.is_fused_experts(module):
        if experts.INPUT_OPS not in module._modules:
            module.add_module(experts.INPUT_OPS, nn.ModuleDict())
        module.get_submodule(experts.INPUT_OPS).update({leaf: ops})  # type: ignore[operator]
        return
    module.add_module(experts.INPUT_OPS, ops)
    module.register_forward_pre_hook(lambda module, args: (ops(args[0]), *args[1:]))


def _module(model: nn.Module, name: str) -> Any:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise InputError(
            f"{type(model).__name__} has no module {name}; load the checkpoint with AutoModelForCausalLM"
        ) from None
