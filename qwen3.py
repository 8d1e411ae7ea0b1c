"""The decoder: Qwen3 (Qwen3 Technical Report, arXiv 2505.09388), and where DeepStack enters it.
Shapes: B batch, n tokens of this call, K cache places in use, D width (hidden_size), H query heads,
G key/value heads, hd head size (H x hd need not be D)."""

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Qwen3Config:
    """What is used of config.json's language_config, by its names there."""

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


class Linear(nn.Linear):
    """A linear map without a bias. A decoding step multiplies few rows by every weight, so memory
    is its limit. On a CPU, torch's float32 product of few rows is slower than that (torch 2.13: one
    row may run on one thread); products with blocks of the matrix use all threads."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.numel() // self.in_features
        float32 = x.dtype == self.weight.dtype == torch.float32
        if rows > 16 or not float32 or x.device.type != "cpu":
            return super().forward(x)
        count = math.gcd(self.out_features, 64)
        blocks = self.weight.view(count, -1, self.in_features)  # [count, out / count, in]
        x_again = x.reshape(1, rows, -1).expand(count, -1, -1)  # [count, rows, in]
        y = torch.bmm(x_again, blocks.mT)  # [count, rows, out / count]
        return y.transpose(0, 1).reshape(*x.shape[:-1], self.out_features)


class RMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        # x / sqrt(mean(x^2) + eps) in float32, rounded to x's type and only then weighted: the
        # other order gives other bits.
        return self.weight * F.rms_norm(x, self.normalized_shape, eps=self.eps)


@functools.cache
def rope_rates(config: Qwen3Config, device: torch.device) -> Tensor:
    """Returns the rotations' rates in radians a position, float32 [hd / 2]. As a buffer of the
    model they would be rounded to bfloat16 with it, and whole turns off at high positions. They are
    made on the CPU, since another device's powers may differ in the last bit."""
    exponents = torch.arange(0, config.head_dim, 2) / config.head_dim
    return (1 / config.rope_theta**exponents).to(device)


def rope_table(positions: Tensor, config: Qwen3Config, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns cosines and sines for int64 positions [B, n], each [B, n, 1, hd]: made in float32 and
    only then rounded to dtype."""
    rates = rope_rates(config, positions.device).repeat(2)  # [hd]
    angles = positions[:, :, None, None].float() * rates  # [B, n, 1, hd]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates heads [B, n, heads, hd]; dimension d is paired with d + hd / 2, not its neighbour."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class KVCache:
    """The keys and values of every layer, and what attention needs beside its input. keys[i] and
    values[i] are layer i's, [B, G, capacity, hd], of the type and on the device of `like`; a token
    at position p has place p."""

    def __init__(self, config: Qwen3Config, batch: int, capacity: int, like: Tensor):
        self.config = config
        # CUDA's attention wants the rows of a mask over the whole cache aligned.
        self.capacity = 16 * math.ceil(capacity / 16)
        shape = (batch, config.num_key_value_heads, self.capacity, config.head_dim)
        # Zeros, not empty memory: a masked place counts 0 times its content, and 0 x NaN is NaN.
        self.keys = [like.new_zeros(shape) for _ in range(config.num_hidden_layers)]
        self.values = [like.new_zeros(shape) for _ in range(config.num_hidden_layers)]

    def grow(self) -> None:
        """Doubles the capacity; what is stored stays."""
        for tensors in (self.keys, self.values):
            for i, stored in enumerate(tensors):
                tensors[i] = F.pad(stored, (0, 0, 0, self.capacity))
        self.capacity *= 2

    def place(self, positions: Tensor, in_use: int) -> None:
        """Prepares attention for tokens at int64 positions [B, n], or [1, n] for all rows; to be
        called once, before the layers. in_use: attention goes over so many places from the first,
        1 + the largest position, or the whole capacity in a graph, whose numbers can't change."""
        self.positions = positions
        self.in_use = in_use
        self.rows = torch.arange(len(self.keys[0]), device=positions.device)[:, None]  # [B, 1]
        self.cos, self.sin = rope_table(positions, self.config, self.keys[0].dtype)
        self.mask = None
        # A lone token sees every place in use, unless the whole cache is, as in a graph.
        if positions.numel() > 1 or in_use == self.capacity:
            sharing = self.config.num_attention_heads // self.config.num_key_value_heads
            queries = positions.repeat_interleave(sharing, dim=1)  # [B, n x H / G]
            places = torch.arange(in_use, device=positions.device)  # [K]
            visible = places <= queries[:, None, :, None]  # [B, 1, n x H / G, K]
            # In the keys' type: SDPA would convert a mask of bool again in every layer.
            self.mask = torch.where(visible, self.keys[0].new_zeros(()), -torch.inf)

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores a layer's new keys and values [B, n, G, hd]; returns all in use, [B, G, K, hd]."""
        # Autocast, in training, may give k and v another type.
        self.keys[layer][self.rows, :, self.positions] = k.to(self.keys[layer].dtype)
        self.values[layer][self.rows, :, self.positions] = v.to(self.values[layer].dtype)
        return self.keys[layer][:, :, : self.in_use], self.values[layer][:, :, : self.in_use]


class Attention(nn.Module):
    def __init__(self, config: Qwen3Config, layer: int):
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, queries)
        self.k_proj = Linear(config.hidden_size, keys)
        self.v_proj = Linear(config.hidden_size, keys)
        self.o_proj = Linear(queries, config.hidden_size)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, x: Tensor, cache: KVCache) -> Tensor:
        B, n, _ = x.shape
        q = self.q_proj(x).view(B, n, -1, self.head_dim)  # [B, n, H, hd]
        k = self.k_proj(x).view(B, n, -1, self.head_dim)  # [B, n, G, hd]
        v = self.v_proj(x).view(B, n, -1, self.head_dim)
        # Each head is normalised by itself, and before it is rotated.
        q = apply_rope(self.q_norm(q), cache.cos, cache.sin)
        k = apply_rope(self.k_norm(k), cache.cos, cache.sin)
        keys, values = cache.write(self.layer, k, v)  # [B, G, K, hd]
        # The H / G query heads that share a key head become rows of one query, so that keys and
        # values are read once for all of them and never copied.
        q = q.unflatten(2, (keys.shape[1], -1)).transpose(1, 2)  # [B, G, n, H / G, hd]
        q = q.flatten(2, 3)  # [B, G, n x H / G, hd]
        x = F.scaled_dot_product_attention(q, keys, values, attn_mask=cache.mask)
        x = x.unflatten(2, (n, -1)).transpose(1, 2)  # [B, n, G, H / G, hd]
        return self.o_proj(x.reshape(B, n, -1))  # [B, n, D]


class MLP(nn.Module):
    def __init__(self, config: Qwen3Config):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, config: Qwen3Config, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: KVCache) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cache)
        return x + self.mlp(self.post_attention_layernorm(x))  # [B, n, D]


class Qwen3(nn.Module):
    """The decoder up to its final norm; lm_head is the whole model's."""

    def __init__(self, config: Qwen3Config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = [DecoderLayer(config, i) for i in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, positions: Tensor, cache: KVCache, in_use: int, deepstack=()):
        """Takes embeddings [B, n, D] to normalised hidden states [B, n, D]. positions and in_use:
        see KVCache.place. deepstack: rows [B, n, D] for the first layers, 0 for text."""
        cache.place(positions, in_use)
        for k, layer in enumerate(self.layers):
            x = layer(x, cache)
            if k < len(deepstack):
                # They join the residual stream that has left layer k, not its input or its inside.
                x = x + deepstack[k]
        return self.norm(x)
