"""The training loop: AdamW, warm-up, clipping, early stop; the best step kept if clearly better."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aqtx.finetune.losses import LossWeights
from aqtx.finetune.routed import Outputs, Routed, Scores
from aqtx.numerics.intervals import clearly_less

Expected = Callable[[Sequence[int]], Outputs]
COMPILE_PAYS_AFTER = 100_000  # tokens of training; a count and no clock, so that reruns give the same bytes


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how fast."""

    learning_rate: float
    weight_decay: float
    epochs: float
    batch_size: int
    warmup_fraction: float
    clip_norm: float
    checks: int  # times that held-out text is looked at
    patience: int  # checks without improvement before it stops
    compile: str  # "auto", "on", "off"

    def compiles(self, num_tokens: int) -> bool:
        """Whether a model in memory is compiled for so many tokens of training."""
        return self.compile == "on" or (self.compile == "auto" and num_tokens >= COMPILE_PAYS_AFTER)


@dataclass(frozen=True)
class Trained:
    """Weights at their best held-out step, and how it went."""

    weights: dict[str, Tensor]
    curve: list[dict[str, Any]]
    best_step: int
    steps: int
    stopped_early: bool
    compiled: bool


class Trainer:
    """One run over sequences ids [n, S], which are told by their places among them.

    Args:
        student: trains.
        targets: outputs of the teacher by places; None where no loss asks for them.
        ids: all sequences.
        loss: what is minimised.
        schedule: how long and how fast.
    """

    def __init__(
        self, student: Scores, targets: Expected | None, ids: Tensor, loss: LossWeights, schedule: Schedule
    ) -> None:
        self.student, self.targets, self.ids = student, targets, ids
        self.loss, self.schedule = loss, schedule
        self.rates: Mapping[str, float] = {}  # factors of the learning rate by weight name, 1 where there is none
        self._whole: Callable[[dict[str, Tensor], Tensor, Outputs | None], Tensor] | None = None

    @property
    def compiled(self) -> bool:
        """Whether model and loss are one compiled function."""
        return self._whole is not None

    def objective(self, weights: dict[str, Tensor], places: Sequence[int]) -> Tensor:
        """The loss of each of these sequences, [B]."""
        ids = self.ids[list(places)]
        if self._whole is not None:
            return self._whole(weights, ids, self._expected(places))
        return self.student.scored(
            ids, weights, lambda outputs, part: self.loss(outputs, self._expected(places[part]), ids[part])
        )

    def _expected(self, places: Sequence[int]) -> Outputs | None:
        return None if self.targets is None else self.targets(places)

    @torch.no_grad()
    def held_out(self, weights: dict[str, Tensor], places: Sequence[int]) -> Tensor:
        """The objective of each sequence."""
        size = self.student.together(self.ids.shape[1], self.schedule.batch_size)
        batches = [places[start : start + size] for start in range(0, len(places), size)]
        return torch.cat([self.objective(weights, batch) for batch in batches])

    def train(
        self,
        start: dict[str, Tensor],
        training: Sequence[int],
        validation: Sequence[int],
        *,
        seed: int,
        progress: Callable[..., Iterable[int]],
    ) -> Trained:
        """Train from `start` (float32, by weight name) on some sequences.

        The best step is kept if it is better than step 0 beyond twice the standard error, else step 0.
        """
        weights = {name: value.clone().requires_grad_() for name, value in start.items()}
        batches = list(_batches(len(training), self.schedule, seed))
        self._maybe_compile(sum(map(len, batches)) * self.ids.shape[1])
        rate = self.schedule.learning_rate
        groups = [{"params": [value], "lr": rate * self.rates.get(name, 1.0)} for name, value in weights.items()]
        optimizer = torch.optim.AdamW(groups, weight_decay=self.schedule.weight_decay)
        shape = torch.optim.lr_scheduler.LambdaLR(optimizer, _warmup_then_cosine(len(batches), self.schedule))
        every = max(1, len(batches) // self.schedule.checks)
        untrained = _Best(start, self.held_out(weights, validation))
        best = copy.copy(untrained)
        curve: list[dict[str, Any]] = [{"step": 0, "training": None, "validation": best.mean}]
        losses: list[float] = []
        for step in progress(range(1, len(batches) + 1), description="training"):
            places = [training[index] for index in batches[step - 1].tolist()]
            losses.append(self._step(weights, places, optimizer))
            shape.step()
            if step % every == 0 or step == len(batches):
                found = self.held_out(weights, validation)
                curve.append({"step": step, "training": sum(losses) / len(losses), "validation": float(found.mean())})
                losses.clear()
                best.offer(weights, found, step)
                if best.misses >= self.schedule.patience:
                    break
        kept = best if clearly_less(best.losses, untrained.losses) else untrained
        early = int(curve[-1]["step"]) < len(batches)
        return Trained(kept.weights, curve, kept.step, int(curve[-1]["step"]), early, self.compiled)

    def _step(self, weights: dict[str, Tensor], places: Sequence[int], optimizer: torch.optim.Optimizer) -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = self.objective(weights, places).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), self.schedule.clip_norm)
        optimizer.step()
        return float(loss.detach())

    def _maybe_compile(self, num_tokens: int) -> None:
        student = self.student
        if self.schedule.compiles(num_tokens) and isinstance(
            student, Routed
        ):  # blocks that are loaded in turn are no one function
            self._whole = torch.compile(
                lambda weights, ids, expected: self.loss(student(ids, weights), expected, ids), dynamic=False
            )


class _Best:
    """The weights of the lowest mean held-out loss."""

    def __init__(self, weights: dict[str, Tensor], losses: Tensor) -> None:
        self.weights, self.losses, self.step, self.misses = weights, losses, 0, 0

    @property
    def mean(self) -> float:
        """Over sequences."""
        return float(self.losses.mean())

    def offer(self, weights: dict[str, Tensor], losses: Tensor, step: int) -> None:
        if float(losses.mean()) < self.mean:
            self.weights = {name: copy.deepcopy(weight.detach()) for name, weight in weights.items()}
            self.losses, self.step, self.misses = losses, step, 0
        else:
            self.misses += 1


def _batches(count: int, schedule: Schedule, seed: int) -> Iterator[Tensor]:
    """Indices of sequences, each epoch in a seeded order of its own; a last short batch is left out."""
    source = torch.Generator().manual_seed(seed)
    left = round(schedule.epochs * max(1, count // schedule.batch_size))
    while left > 0:
        order = torch.randperm(count, generator=source).split(schedule.batch_size)
        whole = [batch for batch in order if len(batch) == schedule.batch_size] or [order[0]]
        yield from whole[:left]
        left -= len(whole)


def _warmup_then_cosine(steps: int, schedule: Schedule) -> Callable[[int], float]:
    """Linear to 1, then a half cosine to 0: the last steps average out what noise the first ones brought."""
    warmup = max(1, round(schedule.warmup_fraction * steps))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))

    return factor
