"""`finetune_router`: train the unfrozen routers so that routing fits the quantized experts."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from aqtx.errors import InputError
from aqtx.finetune.frozen import Frozen
from aqtx.finetune.loop import Schedule, Trainer
from aqtx.finetune.losses import LossWeights
from aqtx.finetune.measure import Routing, measure_routing
from aqtx.finetune.routed import experts_per_token, routed, router_sites
from aqtx.numerics.intervals import bootstrap_ratio
from aqtx.program.program import Program
from aqtx.program.site import Site
from aqtx.registry import Changes, Context, Pass, Walks, register


@register("finetune_router")
@dataclass(frozen=True, kw_only=True)
class FinetuneRouter(Pass):
    """Train the unfrozen routers on calibration text, through the quantized experts and activations.

    x -> router{trainable} -> top-k -> experts(codes) -> logits, loss against the text or the unquantized model

    The last share of the calibration sequences is held out; the routers of the step that is best on its first half are
    kept where they are better than the untrained ones beyond twice the standard error. The second half, which chose
    nothing, tells what was gained. All other tensors are compared by hash.

    Fields:
        cross_entropy, logits, router: weights of the three losses (see `aqtx.finetune.losses`).
        learning_rate: step size of AdamW at its peak; it falls to zero along a cosine.
        weight_decay: AdamW's decay of the routers' weights, per step and unit of learning rate.
        epochs: times that the training sequences are passed over; may be a fraction.
        batch_size: sequences of one step.
        warmup_fraction: share of the steps in which the learning rate rises from zero.
        clip_norm: the largest norm of a step's gradients, all routers together.
        validation_fraction: share of the sequences that is held out: half chooses the step, half tells what it gained.
        checks: times that the held-out sequences are looked at on the way.
        patience: checks without a better loss after which training stops.
        compile: `auto` compiles for 100,000 tokens of training and more, where it pays for itself.
    """

    stage = "train"
    requires = ("unfreeze_router",)

    cross_entropy: float = 0.0
    logits: float = 1.0
    router: float = 0.0
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    epochs: float = 4.0
    batch_size: int = 4
    warmup_fraction: float = 0.1
    clip_norm: float = 1.0
    validation_fraction: float = 0.2
    checks: int = 12
    patience: int = 4
    compile: Literal["auto", "on", "off"] = "auto"

    def validate(self) -> list[str]:
        """Numbers must make sense, and some loss must count."""
        problems = [
            f"{name} must be more than 0, it is {getattr(self, name)}"
            for name in ("learning_rate", "epochs", "batch_size", "clip_norm", "checks", "patience")
            if not getattr(self, name) > 0
        ]
        if min(self.cross_entropy, self.logits, self.router) < 0 or self._loss == LossWeights(0, 0, 0):
            problems.append("the weights cross_entropy, logits and router must not be negative, and one more than 0")
        if not 0 < self.validation_fraction < 1:
            problems.append(f"validation_fraction must lie between 0 and 1, it is {self.validation_fraction}")
        return problems

    @property
    def _loss(self) -> LossWeights:
        return LossWeights(self.cross_entropy, self.logits, self.router)

    def misfits(self, program: Program) -> list[str]:
        """A model without routers."""
        if any(site.category in ("router", "shared_expert_gate") for site in program.sites()):
            return []
        return ["this model has no router to train"]

    def find(self, program: Program) -> list[Site]:
        """What `unfreeze_router` marked."""
        return [site for site in program.sites() if site.get("trainable")]

    def walks(self) -> tuple[Walks, int | None]:
        """The whole model, with gradients of its routers."""
        return "resident", None

    def apply(self, program: Program, sites: list[Site], context: Context) -> Changes:
        """Train, keep the best step, and prove that nothing else changed."""
        if not sites:
            raise InputError("no router is unfrozen: this model has none, or `unfreeze_router` refused them all")
        training, choosing, measuring = self._split(context.calibration().to(context.device))
        frozen = Frozen.of(program, except_for=[site.weight for site in sites])
        student, teacher = routed(program, rounded=True), routed(program, rounded=False)
        num_chosen = experts_per_token(program, sites)
        reference, before = (measure_routing(model, measuring, num_chosen) for model in (teacher, student))
        start = {site.weight: program.read(site).to(context.device) for site in sites}
        trainer = Trainer(student, teacher if self._loss.needs_teacher else None, self._loss, self._schedule())
        with torch.enable_grad():
            found = trainer.train(start, training, choosing, seed=context.seed, progress=context.progress)
        after = measure_routing(student, measuring, num_chosen, found.weights)
        for site in sites if found.best_step else []:
            program.weights.put(site.weight, found.weights[site.weight].to(program.dtype).cpu())
        frozen.check(program)
        details = {
            **self._layers(program, reference, before, after),
            "curve": found.curve,
            "best_step": found.best_step,
            "steps": found.steps,
            "stopped_early": found.stopped_early,
            "compiled": found.compiled,
            "tensors_unchanged": len(frozen.digests),
            **_losses(reference, before, after, context.seed),
        }
        return Changes(changed=[site.name for site in sites] if found.best_step else [], details=details)

    def _schedule(self) -> Schedule:
        names = Schedule.__dataclass_fields__
        return Schedule(**{name: getattr(self, name) for name in names})

    def _split(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sequences to train on, to choose the step by, and to measure on: what is measured has chosen nothing.

        The last ones are held out, as they come from other passages than those before them.
        """
        num_held = round(self.validation_fraction * len(ids))
        if not 2 <= num_held < len(ids):
            raise InputError(
                f"{len(ids)} calibration sequences cannot be split for validation_fraction {self.validation_fraction}: "
                "one is needed to train on, one to choose the step by and one to measure on"
            )
        training, held = ids[:-num_held], ids[-num_held:]
        return training, held[: -(num_held // 2)], held[-(num_held // 2) :]

    def _layers(self, program: Program, reference: Routing, before: Routing, after: Routing) -> dict[str, Any]:
        shifts = zip(before.shift_from(reference), after.shift_from(reference), strict=True)
        loads = zip(before.loads(), after.loads(), strict=True)
        rows = [
            {"layer": site.layer, "shift_before": old, "shift_after": new, "load_before": a, "load_after": b}
            for site, (old, new), (a, b) in zip(router_sites(program), shifts, loads, strict=True)
        ]
        return {"layers": rows}


def _losses(reference: Routing, before: Routing, after: Routing, seed: int) -> dict[str, Any]:
    """Held-out next-token losses in nats per token, and the paired change that training made."""
    ones = np.ones(len(before.losses))
    means = {
        name: float(routing.losses.mean())
        for name, routing in (("unquantized", reference), ("before", before), ("after", after))
    }
    change = bootstrap_ratio(after.losses - before.losses, ones, seed=seed)
    return {"held_out_loss": {**means, "change": change.to_json(), "num_sequences": len(ones)}}
