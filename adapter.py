"""Audio features into the decoder: gated projectors, audio ids with time markers, splicing, DeepStack rows.
Shapes: A audio tokens (12.5 a second), N prompt tokens, E the encoder's output_dim, D the decoder's hidden_size."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

MARKER_TOKENS, MARKER_SECONDS = 25, 2  # a time marker follows 25 audio tokens, which are 2 seconds
DIGIT_IDS = range(
    15, 25
)  # "0" to "9": Qwen's vocabulary begins with the printable bytes from "!" on


@dataclass(frozen=True)
class AdapterConfig:
    """Sizes from config.json, the rest from processor_config.json (one released folder lacks it: hence defaults)."""

    output_dim: int
    adapter_hidden_size: int
    hidden_size: int
    audio_token_id: int = 151_654
    audio_start_id: int = 151_669
    audio_end_id: int = 151_670
    enable_time_marker: bool = True


class GatedMLP(nn.Module):
    """The adapter, and each DeepStack merger: [A, E] to [A, D]."""

    def __init__(self, config: AdapterConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.output_dim, config.adapter_hidden_size, bias=False)
        self.up_proj = nn.Linear(config.output_dim, config.adapter_hidden_size, bias=False)
        self.down_proj = nn.Linear(config.adapter_hidden_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def audio_ids(tokens: int, config: AdapterConfig, time_markers: bool) -> list[int]:
    """A clip of `tokens` audio tokens as prompt ids: start, audio, end.
    With time markers, after every two seconds of audio come the seconds elapsed, in digits: 25 x audio, "2", 25 x
    audio, "4", ... "1", "0", ... They are text: embedded as text, counted in positions, given no DeepStack rows."""
    ids = [config.audio_start_id]
    for done in range(1, tokens + 1):
        ids.append(config.audio_token_id)
        if time_markers and done % MARKER_TOKENS == 0:
            ids += [DIGIT_IDS[int(digit)] for digit in str(done // MARKER_TOKENS * MARKER_SECONDS)]
    return [*ids, config.audio_end_id]


def splice(embeds: torch.Tensor, rows: torch.Tensor, is_audio: torch.Tensor) -> torch.Tensor:
    """Embeddings [..., N, D] with the rows [A, D] in the places where is_audio [..., N] is true."""
    return embeds.index_put(
        (is_audio,), rows.to(embeds)
    )  # autocast, in training, leaves embeddings in float32


def deepstack_rows(rows: torch.Tensor, is_audio: torch.Tensor) -> torch.Tensor:
    """A merger's rows [A, D] laid out like the prompt, [..., N, D], with 0 for text and time markers."""
    return splice(rows.new_zeros(*is_audio.shape, rows.shape[-1]), rows, is_audio)
