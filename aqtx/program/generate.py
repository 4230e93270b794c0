"""Generation through the `step` entry: one graph for prefill and decoding, the cache given from outside.

Prompts of unequal length are padded on the left; `start` tells the graph where each begins, so that padding is never
attended to and positions count from the prompt's first token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from aqtx.errors import InputError
from aqtx.program.cache_spec import CacheSpec, of_graph
from aqtx.program.package import Package
from aqtx.program.program import Program
from aqtx.program.token_ids import num_positions, num_tokens, refuse_ids, refuse_length

Step = Callable[[Tensor, Tensor, Tensor, list[Tensor]], Tensor]  # ids [B, S], pos [S], start [B], cache -> logits
Stop = Callable[[list[int]], bool]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn: the likeliest one at temperature 0, else from the softmax of logits / temperature.

    `top_p` keeps the likeliest tokens that together have so much probability (nucleus sampling, arXiv 1904.09751).
    """

    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what is no temperature or no probability."""
        problems = []
        if not 0 <= self.temperature < float("inf"):
            problems.append(f"temperature must be 0 or more, it is {self.temperature}")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p must be above 0 and at most 1, it is {self.top_p}")
        if problems:
            raise InputError(*problems)

    def pick(self, logits: Tensor, random: torch.Generator) -> Tensor:
        """logits [B, V] of the next token -> tokens [B] on the CPU."""
        if not bool(logits.isfinite().any(-1).all()) or bool(logits.isnan().any()):
            raise InputError("the model's predictions are not finite: a weight is not, or activations overflow")
        if self.temperature == 0:
            return logits.float().argmax(-1).cpu()  # of bf16 it is one by one on a CPU
        probabilities = (logits.float().cpu() / self.temperature).softmax(-1)
        if self.top_p < 1:
            ordered, tokens = probabilities.sort(-1, descending=True)
            before = ordered.cumsum(-1) - ordered  # of likelier tokens; the first one always stays
            probabilities = torch.zeros_like(ordered).scatter(-1, tokens, ordered.masked_fill(before >= self.top_p, 0))
        return probabilities.multinomial(1, generator=random).squeeze(-1)


GREEDY = Sampling()


class Continues(Protocol):
    """What goes on from prompts."""

    def continue_greedily(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, stop: Stop = lambda _: False
    ) -> list[list[int]]:
        """The likeliest tokens for each prompt."""

    def continue_prompts(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        stop: Stop = lambda _: False,
        sampling: Sampling = GREEDY,
        random: torch.Generator | None = None,
    ) -> list[list[int]]:
        """New tokens for each prompt, at most `max_new_tokens`; a sequence ends with the token that made it `stop`."""


class Writes(Protocol):
    """What writes whole texts."""

    @property
    def at_once(self) -> int:
        """Batches that are best written together."""

    def mean_next(self, first: Tensor) -> Tensor:
        """The mean distribution [V], float64, of the token that follows first tokens [B, S]."""

    def write_each(
        self, firsts: Sequence[Tensor], length: int, sampling: Sampling, randoms: Sequence[torch.Generator]
    ) -> list[Tensor]:
        """Sequences [B, length] of each batch that go on from first tokens [B, S]; each draws from its own numbers."""


def refuse_prompts(
    prompts: Sequence[Sequence[int]], max_new_tokens: int, limits: tuple[int | None, int | None]
) -> None:
    """Tell of what a model has no token or no position for; `limits` are its numbers of both, None without an end.

    Raises:
        InputError: a prompt holds such a token, or is too long with what is to be written.
    """
    tokens, positions = limits
    refuse_ids(tokens, map(torch.tensor, prompts), "the prompt")
    longest = max(map(len, prompts)) + max_new_tokens
    refuse_length(positions, longest, "the prompt with what is to be written behind it")


def left_padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Prompts as ids [B, S] that all end in the last column, and where each begins [B]."""
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    for row, prompt in zip(ids, prompts, strict=True):
        row[width - len(prompt) :] = torch.tensor(prompt)
    return ids, torch.tensor([width - len(prompt) for prompt in prompts])


class Generator:
    """Continues prompts. Hold one for many calls: the step graph is bound to its weights once."""

    at_once = 1

    def __init__(self, program: Program) -> None:
        self._device = program.device
        self._limits = num_tokens(program), num_positions(program)
        self._specs: list[CacheSpec] = []
        try:
            self._step: Step = program.module("step")
        except InputError:  # transformers' own module: each token costs a pass over the whole text
            self._score = program.module("score")
            return
        self._specs = of_graph(program.entry("step"))

    @classmethod
    def over(cls, package: Package) -> "Generator":
        """A generator over a compiled `step`."""
        made = cls.__new__(cls)
        made._step, made._specs, made._device, made._limits = (
            package.step,
            package.caches,
            package.device,
            package.limits,
        )
        return made

    @property
    def has_cache(self) -> bool:
        """Whether a token costs one step, and not a pass over the whole text."""
        return bool(self._specs)

    def continue_greedily(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, stop: Stop = lambda _: False
    ) -> list[list[int]]:
        """The likeliest tokens for each prompt, as `continue_prompts` has it."""
        return self.continue_prompts(prompts, max_new_tokens=max_new_tokens, stop=stop)

    @torch.no_grad()
    def continue_prompts(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        stop: Stop = lambda _: False,
        sampling: Sampling = GREEDY,
        random: torch.Generator | None = None,
    ) -> list[list[int]]:
        """New tokens for each prompt, at most `max_new_tokens`; a sequence ends with the token that made it `stop`."""
        random = torch.Generator().manual_seed(0) if random is None else random
        refuse_prompts(prompts, max_new_tokens, self._limits)
        if not self.has_cache:
            return [self._rescore(list(prompt), max_new_tokens, stop, sampling, random) for prompt in prompts]
        ids, start = left_padded(prompts)
        start = start.to(self._device)
        cache = self.make_cache(len(prompts), ids.shape[1] + max_new_tokens)
        pos = torch.arange(ids.shape[1], device=self._device)
        made: list[list[int]] = [[] for _ in prompts]
        live = set(range(len(prompts)))
        for _ in range(max_new_tokens):
            logits = self._step(ids.to(self._device), pos, start, cache)  # [B, S, V]
            ids = sampling.pick(logits[:, -1], random).unsqueeze(-1)
            pos = pos[-1:] + 1
            for index in sorted(live):
                made[index].append(int(ids[index]))
                if stop(made[index]):
                    live.discard(index)
            if not live:
                break
        return made

    def _rescore(
        self, ids: list[int], max_new_tokens: int, stop: Stop, sampling: Sampling, random: torch.Generator
    ) -> list[int]:
        """Continue one prompt without a cache."""
        made: list[int] = []
        while len(made) < max_new_tokens and not (made and stop(made)):
            logits = self._score(torch.tensor([ids + made], device=self._device))  # [1, S, V]
            made.append(int(sampling.pick(logits[:, -1], random)))
        return made

    @torch.no_grad()
    def mean_next(self, first: Tensor, *, batch_size: int = 64) -> Tensor:
        """The mean distribution [V], float64, of the token that follows first tokens [B, S]."""
        total = torch.zeros(())
        for rows in first.split(batch_size):
            if self.has_cache:
                cache, start = self.make_cache(len(rows), first.shape[1]), torch.zeros(len(rows), dtype=torch.long)
                places = torch.arange(first.shape[1], device=self._device)
                logits = self._step(rows.to(self._device), places, start.to(self._device), cache)
            else:
                logits = self._score(rows.to(self._device))
            total = total + logits[:, -1].double().softmax(-1).sum(0).cpu()
        return total / len(first)

    def write_each(
        self, firsts: Sequence[Tensor], length: int, sampling: Sampling, randoms: Sequence[torch.Generator]
    ) -> list[Tensor]:
        """Sequences [B, length] of each batch that go on from first tokens [B, S]; each draws from its own numbers."""
        return [self.write(first, length, sampling, random) for first, random in zip(firsts, randoms, strict=True)]

    @torch.no_grad()
    def write(self, first: Tensor, length: int, sampling: Sampling, random: torch.Generator) -> Tensor:
        """Sequences [B, length] that go on from first tokens [B, S], all to their full length."""
        ids = first
        if not self.has_cache:
            while ids.shape[1] < length:
                logits = self._score(ids.to(self._device))[:, -1]
                ids = torch.cat([ids, sampling.pick(logits, random).unsqueeze(-1)], dim=1)
            return ids
        cache, start = self.make_cache(len(first), length), torch.zeros(len(first), dtype=torch.long)
        pos, newest = torch.arange(first.shape[1]), first
        while ids.shape[1] < length:
            logits = self._step(newest.to(self._device), pos.to(self._device), start.to(self._device), cache)[:, -1]
            newest = sampling.pick(logits, random).unsqueeze(-1)
            ids, pos = torch.cat([ids, newest], dim=1), torch.tensor([ids.shape[1]])
        return ids

    def make_cache(self, batch: int, slots: int) -> list[Tensor]:
        """An empty cache for `batch` sequences of up to `slots` tokens."""
        return [spec.make(batch, slots, self._device) for spec in self._specs]

    def widen_cache(self, cache: list[Tensor], slots: int) -> list[Tensor]:
        """A cache with so many more slots behind those that it has; states have none and stay."""
        return [spec.widen(part, slots) for part, spec in zip(cache, self._specs, strict=True)]

    def num_slots(self, cache: list[Tensor]) -> int:
        """How many slots a cache has."""
        found = (spec.slots(part) for part, spec in zip(cache, self._specs, strict=True))
        return next(slots for slots in found if slots is not None)
