"""The shell around the blocks: embedding, positions and masks, final norm, head, the two entries.

`model(ids)` scores whole sequences. `model(ids, pos, start, kv)` continues sequences whose keys and
values, [B, G, C, D], or states lie in `kv`, two tensors a layer that the call writes in place: one
compiled graph serves prefill and decoding. Legend of shapes: see `layers.py`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aqtx.models.attention import Cache, CacheShape, Positions, Rotation
from aqtx.models.config import DecoderConfig
from aqtx.models.layers import RMSNorm
from aqtx.models.rotary import Rotary


class Block(nn.Module):
    """Pre-norm attention and feed-forward: a pure function of its inputs and weights."""

    def __init__(self, config: DecoderConfig, attention: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = attention
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = mlp

    @property
    def mixer(self) -> nn.Module:
        """The part that looks at other tokens, and keeps a cache."""
        return self.self_attn

    def forward(self, x: Tensor, at: Positions, cache: Cache | None) -> Tensor:
        """x [B, S, H] -> [B, S, H]; a cache is written at `at.slots` and read whole."""
        x = x + self.self_attn(self.input_layernorm(x), at, cache)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Decoder(nn.Module):
    """Embedding, blocks, final norm and rotary frequencies."""

    scale: Tensor

    def __init__(self, config: DecoderConfig, blocks: list[nn.Module], norm: type[RMSNorm]) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(blocks)
        self.norm = norm(config.hidden_size, config.norm_eps)
        self.rotary = Rotary(config.rope, config.rotary_size)
        if config.window_rope is not None:
            self.window_rotary = Rotary(config.window_rope, config.rotary_size)
        if config.embedding_scale is not None:  # a buffer, so that it is rounded as the model's dtype has it
            self.register_buffer("scale", torch.tensor(config.embedding_scale, device="cpu"), persistent=False)

    def embed(self, ids: Tensor) -> Tensor:
        """ids [B, S] -> [B, S, H]."""
        x: Tensor = self.embed_tokens(ids)
        if self.config.embedding_multiplier != 1:
            x = x * self.config.embedding_multiplier
        return x if self.config.embedding_scale is None else x * self.scale.to(x.dtype)

    def rotations(self, places: Tensor, dtype: torch.dtype) -> tuple[Rotation, Rotation]:
        """places [B or 1, S] -> rotations of layers with full attention and with a sliding window."""
        full = self.rotary(places, dtype)
        return full, full if self.config.window_rope is None else self.window_rotary(places, dtype)


class CausalLM(nn.Module):
    """ids [B, S] -> logits [B, S, vocabulary]."""

    def __init__(self, config: DecoderConfig, blocks: list[nn.Module], *, norm: type[RMSNorm] = RMSNorm) -> None:
        super().__init__()
        self.decoder_config = config
        self.model = Decoder(config, blocks, norm)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.head_bias)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self, ids: Tensor, pos: Tensor | None = None, start: Tensor | None = None, kv: list[Tensor] | None = None
    ) -> Tensor:
        """Score `ids`, or, with a cache, continue.

        Args:
            ids: [B, S].
            pos: [S] cache slots of these tokens, the same for all sequences.
            start: [B] first slot that holds a token; the slots before it are left padding.
            kv: what `make_cache` made, two tensors of each layer in turn, written in place.
        """
        x = self.model.embed(ids)
        if pos is None or start is None or kv is None:
            at = self._scoring(ids, x.dtype)
        else:
            at = self._continuing(pos, start, kv[self._slotted], x.dtype)
        for layer, block in enumerate(self.model.layers):
            x = block(x, at, None if kv is None else (kv[2 * layer], kv[2 * layer + 1]))
        logits: Tensor = self.lm_head(self.model.norm(x))
        divisor = self.decoder_config.logits_divisor
        return logits if divisor == 1 else logits / divisor

    def make_cache(self, batch: int, slots: int, *, dtype: torch.dtype | None = None) -> list[Tensor]:
        """An empty cache for `batch` sequences of up to `slots` tokens, padding included."""
        weight = self.lm_head.weight
        return [
            weight.new_zeros(
                batch,
                *(slots if size is None else size for size in shape.sizes),
                dtype=torch.float32 if shape.precise else dtype or weight.dtype,
            )
            for shape in self.cache_shapes
        ]

    @property
    def cache_shapes(self) -> list[CacheShape]:
        """Two of each layer in turn."""
        blocks: list[Any] = list(self.model.layers.children())
        return [shape for block in blocks for shape in block.mixer.cache_shapes]

    @property
    def _slotted(self) -> int:
        """A tensor of the cache that has slots."""
        return next(index for index, shape in enumerate(self.cache_shapes) if None in shape.sizes)

    @property
    def _window(self) -> int | None:
        """The width of the sliding window, None where all layers see everything."""
        return next((window for window in self.decoder_config.windows if window is not None), None)

    def _scoring(self, ids: Tensor, dtype: torch.dtype) -> Positions:
        places = torch.arange(ids.shape[1], device=ids.device)
        full, windowed = self.model.rotations(places.unsqueeze(0), dtype)
        behind = places.unsqueeze(1) - places  # [S, S], how far each key lies behind the query
        mask = self._with_sink(behind >= 0) if self.decoder_config.sinks else None
        window_mask = None
        if self._window is not None:
            window_mask = self._with_sink((behind >= 0) & (behind < self._window))
        return Positions(full, windowed, mask=mask, window_mask=window_mask, slots=None)

    def _with_sink(self, mask: Tensor) -> Tensor:
        """A mask [..., C] with a first column for the slot that `with_sinks` adds, which all may attend to."""
        return F.pad(mask, (1, 0), value=True) if self.decoder_config.sinks else mask

    def _continuing(self, pos: Tensor, start: Tensor, keys: Tensor, dtype: torch.dtype) -> Positions:
        full, windowed = self.model.rotations((pos - start.unsqueeze(1)).clamp(min=0), dtype)
        slots = torch.arange(keys.shape[2], device=pos.device)
        behind = pos.unsqueeze(1) - slots  # [S, C]
        # Padding sees itself: a row with nothing to attend to would be NaN.
        mask = (behind == 0) | ((behind >= 0) & (slots >= start.view(-1, 1, 1, 1)))  # [B, 1, S, C]
        window_mask = None if self._window is None else self._with_sink(mask & (behind < self._window))
        mask = self._with_sink(mask)
        valid = (pos >= start.unsqueeze(1)).unsqueeze(-1)  # [B, S, 1]
        return Positions(full, windowed, mask=mask, window_mask=window_mask, slots=pos, valid=valid)
