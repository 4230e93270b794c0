"""`finetune_router`: train the unfrozen routers so that routing fits the quantized experts."""

from dataclasses import dataclass

from torch import Tensor

from aqtx.errors import InputError
from aqtx.passes.distill import Distill
from aqtx.program.program import Program
from aqtx.program.site import Site
from aqtx.registry import register


@register("finetune_router")
@dataclass(frozen=True, kw_only=True)
class FinetuneRouter(Distill):
    """Train the unfrozen routers on calibration text, through the quantized experts and activations.

    x -> router{trainable} -> top-k -> experts(codes) -> logits, loss against the text or the unquantized model

    The form of `distill` for routers alone: the same losses, held-out text and proof that nothing else changed.

    Fields:
        learning_rate: step size of AdamW at its peak; it falls to zero along a cosine.
    """

    requires = ("unfreeze_router",)

    learning_rate: float = 1e-3
    weight_decay: float = 1e-4

    def misfits(self, program: Program) -> list[str]:
        """A model without routers."""
        if any(site.category in ("router", "shared_expert_gate") for site in program.sites()):
            return []
        return ["this model has no router to train"]

    def names(self, program: Program, sites: list[Site]) -> list[str]:
        """The routers that `unfreeze_router` marked."""
        if not sites:
            raise InputError("no router is unfrozen: this model has none, or `unfreeze_router` refused them all")
        return [site.weight for site in sites]

    def rates(self, start: dict[str, Tensor]) -> dict[str, float]:
        """One learning rate for all."""
        return dict.fromkeys(start, 1.0)
