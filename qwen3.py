"""The decoder: Qwen3 (Qwen3 Technical Report, arXiv 2505.09388), with DeepStack rows added after its first layers.
Shapes: B batch, n tokens of this call, K keys (cached and new), D width (hidden_size), H query heads, G key/value
heads, hd head size (H * hd need not be D)."""

import copy, functools, math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


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
    """Without a bias. On a CPU one row, that is a step of generation, goes at the speed of the memory: torch's product
    of a row with a float32 matrix may run on one thread (torch 2.13)."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        row_on_cpu = x.device.type == "cpu" and x.numel() == self.in_features
        if row_on_cpu and x.dtype == self.weight.dtype == torch.float32:
            blocks = self.weight.view(
                math.gcd(self.out_features, 16), -1, self.in_features
            )  # of rows, on all threads
            return torch.bmm(x.reshape(1, 1, -1).expand(len(blocks), 1, -1), blocks.mT).view(
                *x.shape[:-1], -1
            )
        return super().forward(x)


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.rms_norm(x, x.shape[-1:], eps=self.eps)  # x / sqrt(mean(x^2) + eps), in float32
        return self.weight * x  # rounded, then weighted: the other order gives other bits


@functools.cache
def rope_rates(config: Qwen3Config, device: torch.device) -> torch.Tensor:
    """The rotations' rates, radians a position, float32 [hd / 2]. They are not kept in a buffer, which would be cast
    with the model: in bfloat16 they are whole turns off at high positions. They are made on the CPU, since another
    device's powers may differ in the last bit."""
    return (1 / config.rope_theta ** (torch.arange(0, config.head_dim, 2) / config.head_dim)).to(
        device
    )


def rope_table(
    positions: torch.Tensor, config: Qwen3Config, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin at int positions [B, n], each [B, 1, n, hd]: in float32, and only then rounded to dtype."""
    rates = rope_rates(config, positions.device)
    angles = (positions[:, None, :, None].float() * rates).repeat(1, 1, 1, 2)  # [B, 1, n, hd]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates heads [B, H, n, hd]; dimension d is paired with d + hd / 2, not with its neighbour."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class KVCache:
    """Keys and values of all layers, [layers, B, G, capacity, hd] each, allocated once; the longest row has `length`.
    places: None, all rows are that long; or (0 .. B - 1, where each row's next token goes), int64 [B] each."""

    def __init__(
        self,
        config: Qwen3Config,
        batch: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        capacity += -capacity % 16  # of a mask over all of it, CUDA's kernels want aligned rows
        shape = (
            config.num_hidden_layers,
            batch,
            config.num_key_value_heads,
            capacity,
            config.head_dim,
        )
        self.keys, self.values = (
            torch.zeros(shape, dtype=dtype, device=device) for _ in range(2)
        )  # NaN passes a mask
        self.length, self.places = 0, None

    def row(self, i: int) -> "KVCache":
        """Row i as an empty cache of its own, on the same memory."""
        part = copy.copy(self)
        part.keys, part.values, part.length = self.keys[:, i : i + 1], self.values[:, i : i + 1], 0
        return part

    def drop(self, i: int) -> None:
        """Row i is given up: the last one takes its place."""
        self.keys[:, i], self.values[:, i] = self.keys[:, -1], self.values[:, -1]
        self.keys, self.values = self.keys[:, :-1], self.values[:, :-1]

    def extend(
        self, layer: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores a layer's new keys and values [B, G, n, hd] and gives them with all before them, [B, G, K, hd]."""
        end = self.length + k.shape[2]
        if self.places is None:
            (
                self.keys[layer, :, :, self.length : end],
                self.values[layer, :, :, self.length : end],
            ) = k, v
        else:  # one token a row, written by tensors alone: a CUDA graph would keep a number as it was
            self.keys[layer].transpose(1, 2)[self.places] = k[:, :, 0].to(self.keys)
            self.values[layer].transpose(1, 2)[self.places] = v[:, :, 0].to(self.values)
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class Attention(nn.Module):
    def __init__(self, config: Qwen3Config, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        queries, keys = (
            config.num_attention_heads * config.head_dim,
            config.num_key_value_heads * config.head_dim,
        )
        self.q_proj = Linear(config.hidden_size, queries)
        self.k_proj = Linear(config.hidden_size, keys)
        self.v_proj = Linear(config.hidden_size, keys)
        self.o_proj = Linear(queries, config.hidden_size)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(
        self, x: torch.Tensor, cos, sin, cache: KVCache | None, mask: torch.Tensor | None
    ) -> torch.Tensor:
        B, n, _ = x.shape
        q, k, v = (
            proj(x).view(B, n, -1, self.head_dim)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k, v = (
            self.q_norm(q).transpose(1, 2),
            self.k_norm(k).transpose(1, 2),
            v.transpose(1, 2),
        )  # [B, H|G, n, hd]
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)  # after the norms
        k, v = (k, v) if cache is None else cache.extend(self.layer, k, v)  # [B, G, K, hd]
        G = k.shape[1]
        if n == 1:  # query heads that share a key head become its rows
            q = q.reshape(B, G, -1, self.head_dim)  # [B, G, H / G, hd]
        else:  # each group is a row of the batch, whose heads read the same keys: expand copies nothing
            q = q.reshape(B * G, -1, n, self.head_dim)  # [B G, H / G, n, hd]
            k, v = (
                y.flatten(0, 1)[:, None].expand(-1, q.shape[1], -1, -1) for y in (k, v)
            )  # [B G, H / G, K, hd]
            mask = mask if mask is None or B == 1 else mask.repeat_interleave(G, dim=0)
        x = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None and n > 1
        )
        return self.o_proj(
            x.reshape(B, -1, n, self.head_dim).transpose(1, 2).reshape(B, n, -1)
        )  # [B, n, D]


class MLP(nn.Module):
    def __init__(self, config: Qwen3Config):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, config: Qwen3Config, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, x: torch.Tensor, cos, sin, cache: KVCache | None, mask: torch.Tensor | None
    ) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache, mask)
        return x + self.mlp(self.post_attention_layernorm(x))  # [B, n, D]


def inject(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """DeepStack: rows [B, n, D] are added to the residual stream that has left a layer, not inside it or before it."""
    return x + rows


class Qwen3(nn.Module):
    """The decoder up to its final norm (`lm_head` is the whole model's)."""

    def __init__(self, config: Qwen3Config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x: torch.Tensor,
        positions: torch.Tensor,
        cache: KVCache | None = None,
        mask: torch.Tensor | None = None,
        deepstack: list[torch.Tensor] | tuple = (),
    ) -> torch.Tensor:
        """Embeddings [B, n, D] at int positions [B, n], or [1, n] for all, to normalised hidden states [B, n, D].
        cache: what the tokens see beside each other, and where their own keys and values go. mask: bool [B, 1, n, K],
        true where a token may see a key; None: all before it. deepstack: [B, n, D] each, number k is for layer k."""
        n, ragged = x.shape[1], cache is not None and cache.places is not None
        if mask is None and cache is not None and (ragged or cache.length and n > 1):
            keys = torch.arange(cache.length + n, device=x.device)
            mask = (
                keys <= positions[:, None, :, None]
            )  # [B, 1, n, K]; SDPA's is_causal would align with the first key
        if mask is not None:  # as SDPA would in every layer
            mask = torch.where(mask, x.new_zeros(()), -torch.inf)
        cos, sin = rope_table(positions, self.config, x.dtype)
        for k, layer in enumerate(self.layers):
            x = layer(x, cos, sin, cache, mask)
            x = inject(x, deepstack[k]) if k < len(deepstack) else x
        if cache is not None and not ragged:
            cache.length += n
        return self.norm(x)
