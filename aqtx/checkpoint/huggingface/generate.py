"""Generation for models that only transformers knows: its own modules, over the program's weights, packed or not.

transformers' `generate` keeps the cache that a family needs. What is drawn and when a sequence ends is decided as in
`aqtx.program.generate`: a processor leaves only the token that was picked, a criterion asks `stop`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from aqtx.checkpoint.huggingface import experts
from aqtx.checkpoint.huggingface.inputs import InputOps
from aqtx.checkpoint.huggingface.skeleton import blank
from aqtx.models import supported
from aqtx.program.edits import by_weight
from aqtx.program.generate import GREEDY, Continues, Generator, Sampling, Stop, left_padded, refuse_prompts
from aqtx.program.program import Program
from aqtx.program.token_ids import num_positions, num_tokens


def generator_of(program: Program) -> "Continues":
    """What continues prompts with a cache: the program's own steps, or transformers' modules where it has none."""
    foreign = "model_type" in program.config and not supported(program.config)
    return TransformersGenerator(program) if foreign else Generator(program)


def modules_of(program: Program) -> nn.Module:
    """transformers' model of a program that was traced from one, with the program's weights and edits."""
    from aqtx.checkpoint.huggingface.quantizer import put_before  # brings transformers, which own families do without

    model: Any = blank(program.config)
    fused = {name: module for name, module in model.named_modules() if experts.is_fused_experts(module)}
    if fused:
        model.set_experts_implementation(experts.IMPLEMENTATION)
    for module in fused.values():
        experts.take_out(module)
    for name, value in program.parameters(program.weights.names()).items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if leaf in module._buffers:
            module._buffers[leaf] = value.to(program.device)
        else:
            module._parameters[leaf] = nn.Parameter(value.to(program.device), requires_grad=False)
    for module in model.modules():
        for leaf, buffer in module._buffers.items():
            module._buffers[leaf] = None if buffer is None else buffer.to(program.device)
    for name, edits in by_weight(program.edits).items():
        put_before(model, name, InputOps(edits, program.dtype).to(program.device))
    result: nn.Module = model.eval()
    return result


class TransformersGenerator:
    """Continues prompts. Hold one for many calls: the modules are made once."""

    has_cache = True

    def __init__(self, program: Program) -> None:
        self._device = program.device
        self._limits = num_tokens(program), num_positions(program)
        self._model: Any = modules_of(program)

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
        from transformers import GenerationConfig

        refuse_prompts(prompts, max_new_tokens, self._limits)
        ids, start = (value.to(self._device) for value in left_padded(prompts))
        mask = (torch.arange(ids.shape[1], device=self._device) >= start.unsqueeze(1)).long()
        picking = _Picking(sampling, torch.Generator().manual_seed(0) if random is None else random)
        ended = _Ended(len(prompts), stop)
        self._model.generate(
            ids,
            attention_mask=mask,
            generation_config=GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0),
            logits_processor=[picking],
            stopping_criteria=[ended],
        )
        return ended.made


class _Picking:
    """Leaves one token a sequence: the one that our sampling picks."""

    def __init__(self, sampling: Sampling, random: torch.Generator) -> None:
        self._sampling, self._random = sampling, random

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """ids [B, S], scores [B, V] of the next token -> the same, minus infinity but for one."""
        picked = self._sampling.pick(scores, self._random).to(scores.device).unsqueeze(-1)
        return torch.full_like(scores, float("-inf")).scatter(-1, picked, 0.0)


class _Ended:
    """Collects new tokens, and asks of each sequence whether it stops."""

    def __init__(self, count: int, stop: Stop) -> None:
        self._stop = stop
        self.made: list[list[int]] = [[] for _ in range(count)]
        self._live = [True] * count

    def __call__(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """ids [B, S] so far -> [B], which of them end here."""
        for index, row in enumerate(ids):
            if self._live[index]:
                self.made[index].append(int(row[-1]))
                self._live[index] = not self._stop(self.made[index])
        return torch.tensor([not live for live in self._live], device=ids.device)
