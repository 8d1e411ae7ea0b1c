"""Audio features into the decoder: gated projectors, audio ids with time markers, splicing.
Shapes: A audio tokens (12.5 a second), N prompt tokens, E the encoder's output_dim, D the decoder's
hidden_size."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

# A time marker follows every 25 audio tokens, which are 2 seconds.
MARKER_TOKENS = 25
MARKER_SECONDS = 2
# The ids of "0" to "9": Qwen's vocabulary begins with the printable bytes from "!" on.
DIGIT_IDS = range(15, 25)


@dataclass(frozen=True)
class AdapterConfig:
    """Sizes from config.json; the rest is processor_config.json's, which one release lacks."""

    output_dim: int
    adapter_hidden_size: int
    hidden_size: int
    audio_token_id: int = 151_654
    audio_start_id: int = 151_669
    audio_end_id: int = 151_670
    enable_time_marker: bool = True


class GatedMLP(nn.Module):
    """Projects the encoder's rows, [A, E] to [A, D]: the adapter, and each DeepStack merger."""

    def __init__(self, config: AdapterConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.output_dim, config.adapter_hidden_size, bias=False)
        self.up_proj = nn.Linear(config.output_dim, config.adapter_hidden_size, bias=False)
        self.down_proj = nn.Linear(config.adapter_hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def audio_ids(tokens: int, config: AdapterConfig, time_markers: bool) -> list[int]:
    """Returns a clip of so many audio tokens as prompt ids: start, audio, end. With time markers,
    the elapsed seconds follow every two seconds of audio, in digits: 25 x audio, "2", 25 x audio,
    "4", ... "1", "0", ... They are text: embedded as text, and given no DeepStack rows."""
    ids = [config.audio_start_id]
    for done in range(1, tokens + 1):
        ids.append(config.audio_token_id)
        if time_markers and done % MARKER_TOKENS == 0:
            seconds = done // MARKER_TOKENS * MARKER_SECONDS
            ids += [DIGIT_IDS[int(digit)] for digit in str(seconds)]
    return [*ids, config.audio_end_id]


def splice(x: Tensor, rows: Tensor, is_audio: Tensor) -> Tensor:
    """Returns x [B, N, D] with the rows [A, D] in the places where is_audio [B, N] is true."""
    # Autocast, in training, leaves x in float32 and gives rows in bfloat16.
    return x.index_put((is_audio,), rows.to(x.dtype))
