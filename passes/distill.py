"""`distill`: train what was unfrozen so that the quantized model predicts what the unquantized one does."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from aqtx.errors import InputError
from aqtx.finetune.frozen import Frozen
from aqtx.finetune.loop import Schedule, Trained, Trainer
from aqtx.finetune.losses import LossWeights
from aqtx.finetune.measure import measure_routing, routing_of
from aqtx.finetune.routed import Outputs, Scores, experts_per_token, router_sites
from aqtx.finetune.student import MASTER_COPIES, student_of
from aqtx.finetune.targets import Targets, targets_of
from aqtx.numerics.intervals import bootstrap_ratio
from aqtx.program.program import Program
from aqtx.program.site import Site
from aqtx.registry import Changes, Context, Pass, Walks, register


@register("distill")
@dataclass(frozen=True, kw_only=True)
class Distill(Pass):
    """Train what `unfreeze` marked on calibration text, through the quantized weights and activations.

    x -> model{trainable, codes} -> logits, loss against the unquantized model or the text

    The last share of the calibration sequences is held out; the weights of the step that is best on its first half are
    kept where they are better than the untrained ones beyond twice the standard error. The second half, which chose
    nothing, tells what was gained. All other tensors are compared by hash.

    Fields:
        cross_entropy, logits, router: weights of the three losses (see `aqtx.finetune.losses`).
        learning_rate: step size of AdamW at its peak, as a share of each tensor's root mean square; it falls to zero
            along a cosine.
        weight_decay: AdamW's decay of the weights, per step and unit of learning rate.
        epochs: times that the training sequences are passed over; may be a fraction.
        batch_size: sequences of one step.
        warmup_fraction: share of the steps in which the learning rate rises from zero.
        clip_norm: the largest norm of a step's gradients, all tensors together.
        validation_fraction: share of the sequences that is held out: half chooses the step, half tells what it gained.
        checks: times that the held-out sequences are looked at on the way.
        patience: checks without a better loss after which training stops.
        compile: `auto` compiles for 100,000 tokens of training and more, where it pays for itself. A model larger than
            memory is never compiled.
    """

    stage = "train"
    requires = ("unfreeze",)

    cross_entropy: float = 0.0
    logits: float = 1.0
    router: float = 0.0
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
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

    def find(self, program: Program) -> list[Site]:
        """The matrices among what was marked."""
        return [site for site in program.sites() if site.weight in program.trainable]

    def walks(self) -> tuple[Walks, int | None]:
        """Backward through the quantized model, and once forward through the original."""
        return "training", self.batch_size

    def apply(self, program: Program, sites: list[Site], context: Context) -> Changes:
        """Train, keep the best step, and prove that nothing else changed."""
        names, ids = self.names(program, sites), context.calibration().to(context.device)
        training, choosing, measuring = self._split(len(ids))
        frozen = Frozen.of(program, except_for=names)
        start = {name: program.weights.precise(name).to(context.device) for name in names}
        with targets_of(program, ids, context) as targets:
            masters = (MASTER_COPIES - 1) * sum(value.nbytes for value in start.values())
            student = student_of(program, (self.batch_size, ids.shape[1]), context.room() - masters)
            asked = targets if self._loss.needs_teacher else None
            trainer = Trainer(student, asked, ids, self._loss, self._schedule())
            trainer.rates = self.rates(start)
            with torch.enable_grad():
                found = trainer.train(start, training, choosing, seed=context.seed, progress=context.progress)
            kept = {name: value.to(program.weights.specs[name].dtype).cpu() for name, value in found.weights.items()}
            details = self._details(program, (student, targets), (ids, measuring), kept, context.seed)
        for name in names if found.best_step else []:
            program.weights.put(name, kept[name])
        frozen.check(program)
        details |= _course(found) | {"tensors_unchanged": len(frozen.digests)}
        told = [name.removesuffix(".weight") for name in names]
        return Changes(changed=told if found.best_step else [], details=details)

    def names(self, program: Program, sites: list[Site]) -> list[str]:
        """The parameters to train."""
        if not program.trainable:
            raise InputError("nothing is unfrozen: the model has no such part, or `unfreeze` refused them all")
        return program.trainable

    def rates(self, start: dict[str, Tensor]) -> dict[str, float]:
        """Of each tensor the factor of the learning rate."""
        return {name: max(float(value.square().mean().sqrt()), 1e-2) for name, value in start.items()}

    def compiles(self, num_tokens: int) -> bool:
        """Whether a model that fits is compiled for so many tokens of calibration text."""
        return self._schedule().compiles(round(self.epochs * (1 - self.validation_fraction) * num_tokens))

    def _schedule(self) -> Schedule:
        names = Schedule.__dataclass_fields__
        return Schedule(**{name: getattr(self, name) for name in names})

    def _split(self, count: int) -> tuple[range, range, range]:
        """Sequences to train on, to choose the step by, and to measure on: what is measured has chosen nothing.

        The last ones are held out, as they come from other passages than those before them.
        """
        num_held = round(self.validation_fraction * count)
        if not 2 <= num_held < count:
            raise InputError(
                f"{count} calibration sequences cannot be split for validation_fraction {self.validation_fraction}: "
                "one is needed to train on, one to choose the step by and one to measure on"
            )
        trained, chosen = count - num_held, count - num_held // 2
        return range(trained), range(trained, chosen), range(chosen, count)

    def _details(
        self,
        program: Program,
        models: tuple[Scores, Targets],
        text: tuple[Tensor, range],
        kept: dict[str, Tensor],
        seed: int,
    ) -> dict[str, Any]:
        """What the report says: losses, divergences and routing on held-out text, before and after."""
        (student, targets), routers, (ids, places) = models, router_sites(program), text
        num_chosen, held = experts_per_token(program, routers) if routers else 0, ids[places.start : places.stop]

        def expected(of_held: Sequence[int]) -> Outputs:
            return targets([places[place] for place in of_held])

        on_device = {name: value.to(ids.device) for name, value in kept.items()}
        reference = routing_of(expected, held, num_routers=len(routers), num_chosen=num_chosen)
        before, after = (
            measure_routing(student, held, num_chosen, trained, expected=expected) for trained in (None, on_device)
        )
        shifts = zip(before.shift_from(reference), after.shift_from(reference), strict=True)
        loads = zip(before.loads(), after.loads(), strict=True)
        rows = [
            {"layer": site.layer, "shift_before": old, "shift_after": new, "load_before": a, "load_after": b}
            for site, (old, new), (a, b) in zip(routers, shifts, loads, strict=True)
        ]
        return {
            "layers": rows,
            "held_out_loss": {
                "unquantized": float(reference.losses.mean()),
                **_paired(before.losses, after.losses, seed),
            },
            "held_out_divergence": _paired(before.divergences, after.divergences, seed),
        }


def _course(found: Trained) -> dict[str, Any]:
    names = ("curve", "best_step", "steps", "stopped_early", "compiled")
    return {name: getattr(found, name) for name in names}


def _paired(before: np.ndarray, after: np.ndarray, seed: int) -> dict[str, Any]:
    """Means over held-out sequences, in nats per token, and the paired change that training made."""
    change = bootstrap_ratio(after - before, np.ones(len(before)), seed=seed)
    return {
        "before": float(before.mean()),
        "after": float(after.mean()),
        "change": change.to_json(),
        "num_sequences": len(before),
    }
