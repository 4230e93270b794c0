"""A program behind lm-eval's model interface: log-likelihoods through `score`, generation through `step`.

Encoding and truncation follow lm-eval's own `hf` backend, so that the same weights in float32 answer the same: a
context's trailing spaces move to the continuation, an empty context becomes the start token, what is too long loses its
left end. Special tokens are those that the tokenizer itself adds. Ranks share the batches, and each gets all answers.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm

from aqtx.blockwise.block_scores import many_with, ranks_of, rows_at_once
from aqtx.errors import InputError
from aqtx.program.generate import Continues

Forward = Callable[[Tensor], Tensor]
Encoded = tuple[Any, list[int], list[int]]  # key, context, continuation
Answer = tuple[float, bool]
_MAX_NEW_TOKENS = 256


class ProgramLM(TemplateLM):  # type: ignore[misc]
    """`forward(ids [B, S]) -> logits` and a tokenizer as an lm-eval model.

    Args:
        forward: scores whole sequences.
        tokenizer: one of transformers.
        max_length: tokens that the model is given at a time.
        generator: for tasks that generate; without it they are refused.
        batch_size: sequences at a time.
    """

    def __init__(
        self,
        forward: Forward,
        tokenizer: Any,
        *,
        max_length: int,
        generator: Callable[[], Continues] | None = None,
        batch_size: int = 16,
    ) -> None:
        super().__init__()
        self.forward, self.tokenizer, self.max_length = forward, tokenizer, max_length
        self.batch_size, self.ranks = batch_size, ranks_of(forward)
        self._make_generator = generator
        self._generator: Continues | None = None

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text without context."""
        start = self.tokenizer.bos_token_id
        return self.eot_token_id if start is None else int(start)

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's caches."""
        return str(getattr(self.tokenizer, "name_or_path", "tokenizer")).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; a text that starts with the start token gets no second one."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode([self.prefix_token_id]))
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def _loglikelihood_tokens(self, requests: Sequence[Encoded], disable_tqdm: bool = False, **_: Any) -> list[Answer]:
        """(log-probability, is greedy) of each continuation. Equal inputs run once, whatever their last token is."""
        by_input: dict[tuple[int, ...], list[int]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            by_input.setdefault(tuple((context + continuation)[-(self.max_length + 1) : -1]), []).append(index)
        inputs = sorted(by_input, key=lambda ids: (-len(ids), ids))
        batches = self.ranks.mine(self._batches(inputs))
        found, own = many_with(self.forward)([_padded(batch) for batch in batches]), dict[int, Answer]()
        for batch in tqdm(batches, desc="log-likelihoods", disable=disable_tqdm, delay=2):
            for ids, scores in zip(batch, _log_probabilities(next(found), batch), strict=True):
                own |= {index: _answer(scores, requests[index][2]) for index in by_input[ids]}
        next(found, None)  # to its end, where it clears up
        shared = {index: answer for part in self.ranks.gather(own) for index, answer in part.items()}
        answers = [shared[index] for index in range(len(requests))]
        for request, answer in zip(requests, answers, strict=True):
            if request[0] is not None:
                self.cache_hook.add_partial("loglikelihood", request[0], answer)
        return answers

    def _batches(self, inputs: Sequence[tuple[int, ...]]) -> list[Sequence[tuple[int, ...]]]:
        """Inputs of similar length together; they come longest first."""
        batches, start = [], 0
        while start < len(inputs):
            rows = rows_at_once(self.forward, len(inputs[start]), self.batch_size)
            batches.append(inputs[start : start + rows])
            start += rows
        return batches

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, each token once, in windows that do not overlap but for the last."""
        windows: list[Encoded] = []
        owners = []
        for owner, request in enumerate(requests):
            pieces = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, pieces):
                windows.append((None, context, continuation))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (score, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += score
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations, cut at the first stop sequence."""
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(index)
        own: dict[int, str] = {}
        batches = [batch for members in groups.values() for batch in _slices(members, self.batch_size)]
        for batch in tqdm(self.ranks.mine(batches), desc="generation", disable=disable_tqdm, delay=2):
            own |= zip(batch, self._generate([requests[index].args for index in batch]), strict=True)
        texts = {index: text for part in self.ranks.gather(own) for index, text in part.items()}
        for index, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, texts[index])
        return [texts[index] for index in range(len(requests))]

    def _generate(self, batch: list[tuple[str, dict[str, Any]]]) -> Iterator[str]:
        kwargs = normalize_gen_kwargs(batch[0][1], _MAX_NEW_TOKENS)
        if kwargs.get("do_sample") or kwargs.get("num_beams", 1) != 1:
            raise InputError("a task asks for sampling or beams; only greedy generation is supported")
        until = handle_stop_sequences(kwargs.get("until"), eos=self.tokenizer.decode([self.eot_token_id]))
        longest_stop = max(len(self.tok_encode(word, add_special_tokens=False)) for word in until)
        room = self.max_length - kwargs["max_gen_toks"]
        if room < 1:
            raise InputError(
                f"a task generates up to {kwargs['max_gen_toks']} tokens, the model's context is {self.max_length}"
            )

        def stop(made: list[int]) -> bool:
            # A stop sequence may be split between tokens otherwise than it is alone: look a few tokens further back.
            tail = self.tokenizer.decode(made[-longest_stop - 4 :])
            return made[-1] == self.eot_token_id or any(word in tail for word in until)

        prompts = [self.tok_encode(context)[-room:] for context, _ in batch]
        made = self._generating().continue_greedily(prompts, max_new_tokens=kwargs["max_gen_toks"], stop=stop)
        for tokens in made:
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
            yield postprocess_generated_text(generation=text, stop=until, think_end_token=None)

    def _generating(self) -> Continues:
        if self._generator is None:
            if self._make_generator is None:
                raise InputError("a task generates text, and this model was opened for scoring only")
            self._generator = self._make_generator()
        return self._generator


def _padded(batch: Sequence[tuple[int, ...]]) -> Tensor:
    """[B, S] token ids. Padding stands on the right, where a causal model cannot see it."""
    ids = torch.zeros(len(batch), max(map(len, batch)), dtype=torch.long)
    for row, tokens in zip(ids, batch, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    return ids


@torch.no_grad()
def _log_probabilities(found: Tensor, batch: Sequence[tuple[int, ...]]) -> Iterator[Tensor]:
    """[S, V] of each input of a batch: logits [B, S, V]."""
    for logits, tokens in zip(found, batch, strict=True):
        yield logits[: len(tokens)].float().log_softmax(-1).cpu()


def _slices(items: Sequence[Any], size: int) -> list[Any]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _answer(scores: Tensor, continuation: list[int]) -> Answer:
    """Sum of the continuation's log-probabilities on the last rows of `scores`, and whether each is the largest."""
    targets = torch.tensor(continuation)
    rows = scores[-len(continuation) :]
    chosen = rows.gather(1, targets[:, None]).sum()
    return float(chosen), bool((rows.argmax(-1) == targets).all())
