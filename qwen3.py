"""The decoder: Qwen3 (Qwen3 Technical Report, arXiv 2505.09388), with DeepStack rows added after its first layers.

Shapes: B batch, n tokens of this call, K keys (cached and new), D width (hidden_size), V vocabulary; H query heads, G key/value
heads, hd head size (H * hd need not be D).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class Qwen3Config:
    """The fields of config.json's language_config that are used, by their names there."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float
    rms_norm_eps: float
    max_position_embeddings: int


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scaled = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * scaled.to(x.dtype)  # rounded first, then weighted: the other order gives other bits


def rope_table(positions: torch.Tensor, config: Qwen3Config, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of the rotary angles at int positions [B, n], each [B, 1, n, hd].

    Rates and angles are made here in float32, not kept in a buffer: one cast to bfloat16 with the model would be off by
    whole turns at high positions. Only cos and sin are rounded to the model's type.
    """
    rates = 1 / config.rope_theta ** (torch.arange(0, config.head_dim, 2) / config.head_dim)  # [hd / 2]
    rates = rates.to(positions.device)  # made on the CPU: another device's pow may differ in the last bit
    angles = positions[:, None, :, None].float() * rates  # [B, 1, n, hd / 2]
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates [B, heads, n, hd], pairing dimension d with d + hd / 2 (not with its neighbour)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class KVCache:
    """Keys and values of all layers, allocated once; the first `length` of `capacity` positions are filled."""

    def __init__(self, config: Qwen3Config, batch: int, capacity: int, dtype: torch.dtype, device: torch.device):
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, capacity, config.head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0

    def extend(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes a layer's new keys and values [B, G, n, hd] behind the filled part; returns both with all before them."""
        end = self.length + k.shape[2]
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class Attention(nn.Module):
    """Causal attention with grouped key/value heads, each query and key head normalised before it is rotated."""

    def __init__(self, config: Qwen3Config, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * config.head_dim, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, x, cos, sin, cache: KVCache | None, mask: torch.Tensor | None) -> torch.Tensor:
        B, n, _ = x.shape
        q, k, v = (proj(x).view(B, n, -1, self.head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q = apply_rope(self.q_norm(q).transpose(1, 2), cos, sin)  # [B, H, n, hd]
        k = apply_rope(self.k_norm(k).transpose(1, 2), cos, sin)  # [B, G, n, hd]
        v = v.transpose(1, 2)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)  # [B, G, K, hd]
        causal = mask is None and n > 1
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True)  # [B, H, n, hd]
        return self.o_proj(x.transpose(1, 2).reshape(B, n, -1))  # scale: head_dim ** -0.5, SDPA's own


class MLP(nn.Module):
    def __init__(self, config: Qwen3Config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, config: Qwen3Config, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, cache: KVCache | None, mask: torch.Tensor | None) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache, mask)
        return x + self.mlp(self.post_attention_layernorm(x))  # [B, n, D]


def inject(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """DeepStack: rows [B, n, D] added to the residual stream that has left a layer, so the next layer is the first to see them."""
    return x + rows


def causal_mask(positions: torch.Tensor, keys: int) -> torch.Tensor:
    """bool [B, 1, n, keys], true where the token at positions [B, n] may see the key: all up to its own position."""
    return torch.arange(keys, device=positions.device) <= positions[:, None, :, None]


class Qwen3(nn.Module):
    """The decoder without its output embedding (`lm_head` is the whole model's)."""

    def __init__(self, config: Qwen3Config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x: torch.Tensor,
        positions: torch.Tensor,
        cache: KVCache | None = None,
        mask: torch.Tensor | None = None,
        deepstack: Sequence[torch.Tensor] = (),
    ) -> torch.Tensor:
        """Embeddings [B, n, D] to hidden states [B, n, D], after the final norm.

        positions: int [B, n] (or [1, n] for all). cache: what these tokens also see, and where their keys and values are kept.
        mask: bool [B, 1, n, K], true where a token may see a key; without one each sees all that came before it.
        deepstack: [B, n, D] each; number k is added after layer k.
        """
        if mask is None and cache is not None and cache.length and x.shape[1] > 1:
            mask = causal_mask(positions, cache.length + x.shape[1])  # SDPA's own causal mask knows no earlier keys
        cos, sin = rope_table(positions, self.config, x.dtype)
        for k, layer in enumerate(self.layers):
            x = layer(x, cos, sin, cache, mask)
            if k < len(deepstack):
                x = inject(x, deepstack[k])
        if cache is not None:
            cache.length += x.shape[1]
        return self.norm(x)
