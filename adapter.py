"""Audio features into the decoder: gated projectors, the audio ids with their time markers, splicing, DeepStack rows.

Shapes: A audio tokens (12.5 a second), N prompt tokens, E the encoder's output width, D the decoder's width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

TOKENS_PER_MARKER = 25  # two seconds
SECONDS_PER_MARKER = 2
DIGIT_IDS = range(15, 25)  # "0".."9" in every Qwen3 vocabulary, which begins with the printable bytes in order


@dataclass(frozen=True)
class AdapterConfig:
    """Widths (config.json's output_dim, adapter_hidden_size, hidden_size) and ids (processor_config.json's)."""

    output_dim: int
    adapter_hidden_size: int
    hidden_size: int
    audio_token_id: int = 151_654
    audio_start_id: int = 151_669
    audio_end_id: int = 151_670
    enable_time_marker: bool = True


class GatedMLP(nn.Module):
    """The projector of the encoder's output, and of each tap: [A, E] to [A, D]."""

    def __init__(self, config: AdapterConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.output_dim, config.adapter_hidden_size, bias=False)
        self.up_proj = nn.Linear(config.output_dim, config.adapter_hidden_size, bias=False)
        self.down_proj = nn.Linear(config.adapter_hidden_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def audio_ids(tokens: int, config: AdapterConfig, time_markers: bool) -> list[int]:
    """The ids of one clip of `tokens` audio tokens: start, audio ids, end.

    With time markers the elapsed seconds follow every 25 audio tokens, as digits: 25 x audio, "2", 25 x audio, "4", ...
    25 x audio, "1", "0", ... Markers are text: they embed as text, take positions, and get no DeepStack.
    """
    ids = [config.audio_start_id]
    for start in range(0, tokens, TOKENS_PER_MARKER):
        end = start + TOKENS_PER_MARKER
        ids += [config.audio_token_id] * (min(end, tokens) - start)
        if time_markers and end <= tokens:
            seconds = end // TOKENS_PER_MARKER * SECONDS_PER_MARKER
            ids += [DIGIT_IDS[int(digit)] for digit in str(seconds)]
    return [*ids, config.audio_end_id]


def splice(embeds: torch.Tensor, rows: torch.Tensor, is_audio: torch.Tensor) -> torch.Tensor:
    """Text embeddings [..., N, D] with the adapter's rows [A, D] in place of those where is_audio [..., N] is true."""
    return embeds.index_put((is_audio,), rows)


def deepstack_rows(rows: torch.Tensor, is_audio: torch.Tensor) -> torch.Tensor:
    """A DeepStack projector's rows [A, D] laid out as the prompt is: [..., N, D], zero where is_audio [..., N] is false.

    Row set k is added to what leaves decoder layer k, so a prompt's text and time markers get nothing.
    """
    return splice(rows.new_zeros(*is_audio.shape, rows.shape[-1]), rows, is_audio)
