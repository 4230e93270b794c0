"""Gated DeltaNet (arXiv 2412.06464): linear attention with a matrix per head as its state, decayed and corrected.

    S_t = exp(g_t) S_{t-1};  S_t += k_t (beta_t (v_t - S_t^T k_t))^T;  o_t = S_t^T q_t

The rule is one op in a traced graph, whatever the length: inside, tokens are taken in chunks, within which the
corrections solve one triangular system (section 3.3 of the paper). Legend of shapes: see `layers.py`; N key heads,
M value heads, a multiple of N, P key size, V value size.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aqtx.models.attention import Cache, CacheShape, Positions
from aqtx.models.config import Fields
from aqtx.models.layers import RMSNorm

CHUNK = 64
UNIT_EPS = 1e-6  # below the root that makes queries and keys unit vectors


@torch.library.custom_op("aqtx::gated_delta_rule", mutates_args=())
def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The rule over a sequence, computed in float32.

    Args:
        q: queries [B, S, M, P], k: keys [B, S, M, P], v: values [B, S, M, V].
        decay: logarithms of the decay [B, S, M], at most 0.
        beta: strength of the correction [B, S, M].
        state: [B, M, P, V] before the first token; None is zero.

    Returns:
        Outputs [B, S, M, V] in v's dtype and the state behind the last token, float32.
    """
    return _by_chunks(q, k, v, decay, beta, state)


@gated_delta_rule.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    shape = (q.shape[0], v.shape[2], q.shape[3], v.shape[3])
    return torch.empty_like(v), q.new_empty(shape, dtype=torch.float32)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_out: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
    """By running the rule again: between the passes nothing is kept but its inputs."""
    inputs = [None if value is None else value.detach().requires_grad_() for value in ctx.saved_tensors]
    with torch.enable_grad():
        outputs = _by_chunks(*inputs)  # type: ignore[arg-type]
        given = [value for value in inputs if value is not None]
        found = iter(torch.autograd.grad(outputs, given, (grad_out, grad_state)))
    return tuple(None if value is None else next(found) for value in inputs)


gated_delta_rule.register_autograd(_backward, setup_context=_save_inputs)


def _by_chunks(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    batch, length, heads, size = q.shape
    whole = [part.transpose(1, 2).float() for part in (q, k, v, decay, beta)]  # [B, M, S, ...]
    zero = whole[0].new_zeros(batch, heads, size, v.shape[-1])
    current, outputs = zero if state is None else state.float(), []
    for begin in range(0, length, CHUNK):
        out, current = _chunk(*(part[:, :, begin : begin + CHUNK] for part in whole), state=current)
        outputs.append(out)
    return torch.cat(outputs, 2).transpose(1, 2).to(v.dtype, memory_format=torch.contiguous_format), current


def _chunk(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, *, state: Tensor) -> tuple[Tensor, Tensor]:
    """One chunk of C tokens: q, k [B, M, C, P], v [B, M, C, V], decay and beta [B, M, C]."""
    total = decay.cumsum(-1)  # logarithm of the decay since the chunk began
    length = q.shape[2]
    later = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    between = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(later, float("-inf")).exp()  # [B, M, C, C]
    strong, since = k * beta.unsqueeze(-1), total.exp().unsqueeze(-1)
    wanted = v * beta.unsqueeze(-1) - (strong * since) @ state
    system = (strong @ k.transpose(-1, -2)) * between  # token i reads what earlier tokens of the chunk wrote
    written = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)  # [B, M, C, V]
    out = (q * since) @ state + ((q @ k.transpose(-1, -2)) * between) @ written
    left = (total[..., -1:] - total).exp().unsqueeze(-1)
    return out, state * since[:, :, -1:] + (k * left).transpose(-1, -2) @ written


@dataclass(frozen=True, kw_only=True)
class DeltaConfig:
    """Sizes of the linear attention's heads and of its convolution."""

    hidden_size: int
    key_heads: int
    value_heads: int
    key_size: int
    value_size: int
    kernel: int
    norm_eps: float
    fused: bool  # queries, keys, values and gates of a key head lie together in one projection

    @classmethod
    def read(cls, fields: Fields, *, fused: bool) -> "DeltaConfig":
        """The fields as the Qwen3-Next family spells them."""
        made = cls(
            hidden_size=fields.integer("hidden_size"),
            key_heads=fields.integer("linear_num_key_heads", 16),
            value_heads=fields.integer("linear_num_value_heads", 32),
            key_size=fields.integer("linear_key_head_dim", 128),
            value_size=fields.integer("linear_value_head_dim", 128),
            kernel=fields.integer("linear_conv_kernel_dim", 4),
            norm_eps=fields.number("rms_norm_eps", 1e-6),
            fused=fused,
        )
        if made.value_heads % made.key_heads:
            fields.problems.append("config.json: linear_num_value_heads is not a multiple of linear_num_key_heads")
        return made

    @property
    def keys(self) -> int:
        """Width of all keys."""
        return self.key_heads * self.key_size

    @property
    def values(self) -> int:
        """Width of all values."""
        return self.value_heads * self.value_size


class GatedDeltaNet(nn.Module):
    """Projections, a short causal convolution per channel, the rule, and a gated norm."""

    def __init__(self, config: DeltaConfig) -> None:
        super().__init__()
        self.config = config
        hidden, channels = config.hidden_size, 2 * config.keys + config.values
        if config.fused:
            self.in_proj_qkvz = nn.Linear(hidden, channels + config.values, bias=False)
            self.in_proj_ba = nn.Linear(hidden, 2 * config.value_heads, bias=False)
        else:
            self.in_proj_qkv = nn.Linear(hidden, channels, bias=False)
            self.in_proj_z = nn.Linear(hidden, config.values, bias=False)
            self.in_proj_b = nn.Linear(hidden, config.value_heads, bias=False)
            self.in_proj_a = nn.Linear(hidden, config.value_heads, bias=False)
        self.conv1d = nn.Conv1d(channels, channels, config.kernel, groups=channels, bias=False)
        self.dt_bias = nn.Parameter(torch.ones(config.value_heads))
        self.A_log = nn.Parameter(torch.zeros(config.value_heads))
        self.norm = RMSNorm(config.value_size, config.norm_eps)
        self.out_proj = nn.Linear(config.values, hidden, bias=False)

    @property
    def cache_shapes(self) -> list[CacheShape]:
        """The last inputs of the convolution, and the state, which adds up and so stays in float32."""
        config = self.config
        state = (config.value_heads, config.key_size, config.value_size)
        return [CacheShape((2 * config.keys + config.values, config.kernel - 1)), CacheShape(state, precise=True)]

    def forward(self, x: Tensor, at: Positions, cache: Cache | None) -> Tensor:
        """x [B, S, H] -> [B, S, H]; a cache is read, and replaced by what stands behind the last token."""
        config = self.config
        if at.valid is not None:
            x = x * at.valid.to(x.dtype)  # padding writes nothing: its keys and values are zero
        mixed, z, b, a = self._project(x)
        q, k, v = self._convolve(mixed, cache).split([config.keys, config.keys, config.values], dim=-1)
        q, k = (part.unflatten(-1, (config.key_heads, config.key_size)) for part in (q, k))
        q, k = (unit(part).repeat_interleave(config.value_heads // config.key_heads, dim=2) for part in (q, k))
        v = v.unflatten(-1, (config.value_heads, config.value_size))
        decay = -self.A_log.float().exp() * F.softplus(a.float() + self.dt_bias)
        scaled = q * config.key_size**-0.5
        out, state = torch.ops.aqtx.gated_delta_rule(
            scaled, k, v, decay, b.sigmoid(), None if cache is None else cache[1]
        )
        if cache is not None:
            cache[1].copy_(state)
        gated = (self.norm(out) * F.silu(z.float())).to(x.dtype)
        projected: Tensor = self.out_proj(gated.flatten(2))
        return projected

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, S, channels], gates [B, S, M, V], and what makes beta and decay [B, S, M]."""
        config = self.config
        if not config.fused:
            z = self.in_proj_z(x).unflatten(-1, (config.value_heads, config.value_size))
            return self.in_proj_qkv(x), z, self.in_proj_b(x), self.in_proj_a(x)
        each = config.value_heads // config.key_heads  # value heads of a key head
        heads = self.in_proj_qkvz(x).unflatten(-1, (config.key_heads, -1))
        sizes = [config.key_size, config.key_size, each * config.value_size, each * config.value_size]
        q, k, v, z = heads.split(sizes, dim=-1)
        b, a = self.in_proj_ba(x).unflatten(-1, (config.key_heads, -1)).split([each, each], dim=-1)
        mixed = torch.cat([part.flatten(2) for part in (q, k, v)], dim=-1)
        return mixed, z.flatten(2).unflatten(-1, (config.value_heads, config.value_size)), b.flatten(2), a.flatten(2)

    def _convolve(self, mixed: Tensor, cache: Cache | None) -> Tensor:
        """[B, S, channels]: each channel sees itself and its last `kernel` - 1 values."""
        rows = mixed.transpose(1, 2)  # [B, channels, S]
        if cache is None:
            rows = F.pad(rows, (self.config.kernel - 1, 0))
        else:
            rows = torch.cat((cache[0], rows), dim=-1)
            cache[0].copy_(rows[..., 1 - self.config.kernel :])
        return F.silu(F.conv1d(rows, self.conv1d.weight, groups=rows.shape[1])).transpose(1, 2)


def unit(x: Tensor) -> Tensor:
    """Vectors of length 1 along the last dimension, computed in float32."""
    x = x.float()
    return x * (x.square().sum(-1, keepdim=True) + UNIT_EPS).rsqrt()
