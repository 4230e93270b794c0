"""Greedy generation through the `step` entry: one graph for prefill and decoding, the cache given from outside.

Prompts of unequal length are padded on the left; `start` tells the graph where each begins, so that padding is never
attended to and positions count from the prompt's first token.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from aqtx.errors import InputError
from aqtx.program.program import Program

Stop = Callable[[list[int]], bool]


class Generator:
    """Continues prompts greedily. Hold one for many calls: the step graph is bound to its weights once."""

    def __init__(self, program: Program) -> None:
        self._device = program.device
        try:
            self._step = program.module("step")
        except InputError:  # transformers' own module: each token costs a pass over the whole text
            self._score = program.module("score")
            self._heads = []
            return
        # After ids, pos and start come the caches; their traced shapes [B, G, C, D] tell G and D of each layer.
        placeholders = [node for node in program.entry("step").graph.nodes if node.op == "placeholder"][3:]
        self._heads = [(int(node.meta["val"].shape[1]), int(node.meta["val"].shape[3])) for node in placeholders]
        self._dtype = placeholders[0].meta["val"].dtype

    @torch.no_grad()
    def continue_greedily(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, stop: Stop = lambda _: False
    ) -> list[list[int]]:
        """New tokens for each prompt, at most `max_new_tokens`; a sequence ends with the token that made it `stop`."""
        if not self._heads:
            return [self._rescore(list(prompt), max_new_tokens, stop) for prompt in prompts]
        width = max(len(prompt) for prompt in prompts)
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        for row, prompt in zip(ids, prompts, strict=True):
            row[width - len(prompt) :] = torch.tensor(prompt)
        start = torch.tensor([width - len(prompt) for prompt in prompts], device=self._device)
        cache = self.make_cache(len(prompts), width + max_new_tokens)
        pos = torch.arange(width, device=self._device)
        made: list[list[int]] = [[] for _ in prompts]
        live = set(range(len(prompts)))
        for _ in range(max_new_tokens):
            logits = self._step(ids.to(self._device), pos, start, cache)  # [B, S, V]
            ids = logits[:, -1].argmax(-1, keepdim=True).cpu()
            pos = pos[-1:] + 1
            for index in sorted(live):
                made[index].append(int(ids[index]))
                if stop(made[index]):
                    live.discard(index)
            if not live:
                break
        return made

    def _rescore(self, ids: list[int], max_new_tokens: int, stop: Stop) -> list[int]:
        """Continue one prompt without a cache."""
        made: list[int] = []
        while len(made) < max_new_tokens and not (made and stop(made)):
            logits = self._score(torch.tensor([ids + made], device=self._device))  # [1, S, V]
            made.append(int(logits[0, -1].argmax()))
        return made

    def make_cache(self, batch: int, slots: int) -> list[Tensor]:
        """An empty cache for `batch` sequences of up to `slots` tokens."""
        return [
            torch.zeros(batch, heads, slots, size, dtype=self._dtype, device=self._device)
            for heads, size in self._heads
        ]
