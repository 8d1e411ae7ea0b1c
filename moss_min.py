"""MOSS-Audio, minimal and exact: configuration, tokenizer, loading, prompt, model, command line.

The parts: encoder.py (sound to features), adapter.py (features into the decoder), qwen3.py (the decoder), sample.py
(generation). Shapes: T mel frames, A audio tokens, N prompt tokens, D the decoder's width, V vocabulary.
"""

from __future__ import annotations

import os
import signal
import sys

if __name__ == "__main__":  # Ctrl-C ends quietly while the imports, which take seconds, still run
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
import json
import math
import re
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import nn

from adapter import AdapterConfig, GatedMLP, audio_ids, deepstack_rows, splice
from encoder import HOP, SAMPLE_RATE, AudioEncoder, EncoderConfig, count_tokens, load_audio, log_mel
from qwen3 import Qwen3, Qwen3Config
from sample import Sampling, generate, split_thinking, stream_answer, stream_text

# ---- configuration ----

KINDS = {  # kind (a config field's annotation) -> is a JSON value of that kind, what was expected
    "int": (lambda v: type(v) is int and 0 < v < 2**31, "a positive whole number"),
    "float": (lambda v: type(v) in (int, float) and 0 < v < math.inf, "a positive number"),
    "bool": (lambda v: type(v) is bool, "true or false"),
    "tuple[int, ...]": (lambda v: type(v) is list and all(type(i) is int and i >= 0 for i in v), "numbers from 0 up"),
    "object": (lambda v: type(v) is dict, "a JSON object"),
}
FIXED = {  # values that would change the arithmetic: another one is refused, not ignored
    "": {"model_type": "moss_audio", "tie_word_embeddings": False},
    "audio_config": {"num_mel_bins": 128, "activation_function": "gelu", "downsample_rate": 8},
    "language_config": {"hidden_act": "silu", "attention_bias": False, "rope_scaling": None,
                        "use_sliding_window": False, "tie_word_embeddings": False},
    "mel_config": {"mel_sr": 16_000, "mel_dim": 128, "mel_n_fft": 400, "mel_hop_length": 160, "mel_dtype": "bfloat16",
                   "use_whisper_feature_extractor": True},
}  # fmt: skip


@dataclass(frozen=True)
class MossConfig:
    """What matters of a checkpoint folder's JSON files."""

    encoder: EncoderConfig  # its taps are those that are used
    adapter: AdapterConfig
    decoder: Qwen3Config
    stop_ids: tuple[int, ...]


def checked(value, kind: str, name: str):
    """The value, if it is of that kind (a list as a tuple)."""
    good, expected = KINDS[kind]
    if not good(value):
        raise ValueError(f"{name} is {'missing' if value is None else f'{value!r:.60}'}; expected {expected}")
    return tuple(value) if type(value) is list else value


def read_json(path: Path, default: dict | None = None) -> dict:
    """The JSON object in a file, or `default` if there is no such file."""
    if default is not None and not path.exists():
        return default
    try:
        return checked(json.loads(path.read_bytes()), "object", path.name)
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}, which a checkpoint folder has, can't be read: {error}") from error


def read_fields(config_class: type, data: dict, where: str):
    """A config dataclass from the values under its fields' names; one that has a default may be left out."""
    given = [field for field in fields(config_class) if field.name in data or field.default is MISSING]
    return config_class(**{f.name: checked(data.get(f.name), f.type, f"{where}.{f.name}") for f in given})


def read_config(folder: Path) -> MossConfig:
    """A checkpoint folder's configuration. Raises ValueError for what is missing, wrong or not supported."""
    config, processor = read_json(folder / "config.json"), read_json(folder / "processor_config.json", {})
    parts = {name: checked(config.get(name), "object", f"config.json: {name}") for name in ("audio_config", "language_config")}
    parts[""] = {"model_type": None, **config}
    parts["mel_config"] = checked(processor.get("mel_config", {}), "object", "processor_config.json: mel_config")
    for part, values in FIXED.items():
        for name, value in values.items():
            if (given := parts[part].get(name, value)) != value:
                raise ValueError(f"{f'{part}.{name}'.strip('.')} is {given!r:.60}; only {value!r} is supported")
    encoder = read_fields(EncoderConfig, parts["audio_config"], "config.json: audio_config")
    decoder = read_fields(Qwen3Config, parts["language_config"], "config.json: language_config")
    widths = {"output_dim": encoder.output_dim, "adapter_hidden_size": config.get("adapter_hidden_size")}
    adapter = read_fields(AdapterConfig, processor | widths | {"hidden_size": decoder.hidden_size}, "config")
    taps = encoder.deepstack_encoder_layer_indexes
    used = config.get("deepstack_num_inject_layers", len(taps))
    eos = read_json(folder / "generation_config.json", {}).get("eos_token_id", parts["language_config"].get("eos_token_id"))
    stop_ids = checked([eos] if type(eos) is int else eos, "tuple[int, ...]", "eos_token_id")
    ids = (adapter.audio_token_id, adapter.audio_start_id, adapter.audio_end_id, *stop_ids)
    demands = {
        "d_model: even, above 2, a multiple of encoder_attention_heads": encoder.d_model > 2
        and encoder.d_model % 2 == encoder.d_model % encoder.encoder_attention_heads == 0,
        "deepstack_encoder_layer_indexes: each below encoder_layers": max(taps, default=0) < encoder.encoder_layers,
        "deepstack_num_inject_layers: a whole number from 0 up": type(used) is int and used >= 0,
        "num_attention_heads: a multiple of num_key_value_heads": decoder.num_attention_heads % decoder.num_key_value_heads == 0,
        "head_dim: even": decoder.head_dim % 2 == 0,
        "audio and eos token ids: each below vocab_size": max(ids) < decoder.vocab_size,
    }
    for demand, met in demands.items():
        if not met:
            raise ValueError(f"config.json does not meet what is expected of {demand}")
    return MossConfig(replace(encoder, deepstack_encoder_layer_indexes=taps[:used]), adapter, decoder, stop_ids)


# ---- tokenizer and weights ----

SPLIT = (  # Qwen's pattern: every digit is a piece of its own, as the time markers need
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The byte-level BPE of tokenizer.json, or else of vocab.json, merges.txt and tokenizer_config.json."""
    try:
        if (folder / "tokenizer.json").exists():
            return Tokenizer.from_file(str(folder / "tokenizer.json"))
        vocab, merges = models.BPE.read_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
        added = read_json(folder / "tokenizer_config.json")["added_tokens_decoder"]
        vocab |= {token["content"]: int(i) for i, token in added.items()}  # each gets the id it has there
        tokenizer = Tokenizer(models.BPE(vocab, merges))
        tokenizer.add_tokens([AddedToken(**token) for token in added.values()])
    except Exception as error:  # tokenizers raises no narrower class
        raise ValueError(f"{folder}: the tokenizer can't be read: {error!r}") from error
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # safetensors' names
DERIVED = "audio_encoder.embed_positions.inv_timescales"  # in some re-exports; computed here


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies."""

    path: Path
    offset: int  # bytes from the file's beginning
    shape: list[int]
    dtype: str


def find_tensors(folder: Path, model: nn.Module) -> dict[str, Stored]:
    """The model's tensors in a checkpoint folder, by name, shard after shard. Raises ValueError if they don't fit it."""
    lone, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if not index.exists() and not lone.exists():
        raise ValueError(f"{folder}: no {index.name} or {lone.name} (weights of another kind, such as pickles, are not read)")
    weight_map = checked(read_json(index).get("weight_map"), "object", "weight_map") if index.exists() else {"": lone.name}
    found = {}
    for name in sorted(set(map(str, weight_map.values()))):
        if Path(name).name != name:
            raise ValueError(f"{index}: names {name!r:.60}; expected a file in the same folder")
        try:
            safe_open(folder / name, "pt")  # checks that the file is whole
            with open(folder / name, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{folder / name}: not a whole safetensors file: {error}") from error
        for key, entry in header.items():
            if key not in ("__metadata__", DERIVED) and weight_map.get(key, name) == name:
                found[key] = Stored(folder / name, 8 + length + entry["data_offsets"][0], entry["shape"], entry["dtype"])
    expected = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
    wrong = {
        "missing": [key for key in expected if key not in found],
        "unexpected": [key for key in found if key not in expected],
        "of another shape": [f"{key} {found[key].shape} instead of {shape}" for key, shape in expected.items()
                             if key in found and found[key].shape != shape],
        "of another type": [f"{key} ({at.dtype})" for key, at in found.items() if at.dtype not in STORED],
    }  # fmt: skip
    if any(wrong.values()):
        parts = (f"{len(keys)} {what} (first: {keys[0]:.90})" for what, keys in wrong.items() if keys)
        raise ValueError(f"{folder}: tensors don't fit config.json: {', '.join(parts)}")
    return found


def read_tensor(at: Stored, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """A tensor from its file, straight to device and type.

    In small blocks and not mapped: a mapped file's pages would count as memory of the process, on top of the copy.
    """
    tensor = torch.empty(at.shape, dtype=dtype, device=device)
    with open(at.path, "rb", buffering=0) as file:
        file.seek(at.offset)
        for block in tensor.view(-1).split(1 << 22):
            raw = torch.empty(len(block), dtype=STORED[at.dtype])
            file.readinto(raw.view(torch.uint8).numpy())
            block.copy_(raw)
    return tensor


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA, else MPS, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        if (device := torch.device(name)).type in ("cuda", "mps", "cpu"):
            return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} is not there: {error}") from error
    raise ValueError(f"device {name!r} is not supported; expected auto, cuda, mps or cpu")


# ---- prompt and model ----

WRAP = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{}{}<|im_end|>\n<|im_start|>assistant\n"
PLACEHOLDER = re.compile(r"<\|audio_bos\|>(?:<\|AUDIO\|>)+<\|audio_eos\|>")
PIECES = ("<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>")


@dataclass(frozen=True)
class Prompt:
    ids: torch.Tensor  # int64 [N]
    mels: list[torch.Tensor]  # bfloat16 [128, T] for each clip


class MossAudio(nn.Module):
    """The whole model; its submodules have the checkpoint's names."""

    def __init__(self, config: MossConfig, tokenizer: Tokenizer):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.audio_encoder = AudioEncoder(config.encoder)
        self.audio_adapter = GatedMLP(config.adapter)
        taps = config.encoder.deepstack_encoder_layer_indexes
        self.deepstack_audio_merger_list = nn.ModuleList(GatedMLP(config.adapter) for _ in taps)
        self.language_model = Qwen3(config.decoder)
        self.lm_head = nn.Linear(config.decoder.hidden_size, config.decoder.vocab_size, bias=False)

    @classmethod
    def from_pretrained(cls, folder, device="auto", dtype="auto", report: Callable[[str], None] = lambda line: None):
        """The model in a checkpoint folder, on a device, for inference (no parameter requires a gradient).

        device: "auto" is CUDA, else MPS, else the CPU. dtype: float32, bfloat16, float16, or "auto", which is float32 on a
        CPU and elsewhere the type that lm_head is stored in. report: called with a line for each shard. Raises ValueError.
        """
        folder, device = Path(folder), pick_device(device)
        if dtype not in ("auto", *DTYPES):
            raise ValueError(f"dtype is {dtype!r}; expected auto, {', '.join(DTYPES)}")
        config, tokenizer = read_config(folder), load_tokenizer(folder)
        if (largest := max(tokenizer.get_vocab().values(), default=0)) >= config.decoder.vocab_size:
            raise ValueError(f"the tokenizer has an id {largest}, but vocab_size is {config.decoder.vocab_size}")
        with torch.device("meta"):  # shapes without memory
            model = cls(config, tokenizer).requires_grad_(False)
        found = find_tensors(folder, model)
        dtype = DTYPES.get(dtype, torch.float32 if device.type == "cpu" else STORED[found["lm_head.weight"].dtype])
        if dtype == torch.float32 and device.type == "cuda":  # TF32 keeps 10 bits of the mantissa: that is not float32
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        tensors, shards = {}, list(dict.fromkeys(at.path for at in found.values()))
        for i, shard in enumerate(shards):
            report(f"loading {shard.name} ({i + 1} of {len(shards)})")
            tensors |= {key: read_tensor(at, device, dtype) for key, at in found.items() if at.path == shard}
        model.load_state_dict(tensors, assign=True)
        return model.eval()

    def prompt(self, text: str, clips=(), time_markers: bool | None = None) -> Prompt:
        """Text and clips (what load_audio takes, paths or arrays) to the ids and log-mels that the model takes.

        A text without placeholders (<|audio_bos|><|AUDIO|><|audio_eos|>) is wrapped as a user's message behind the clips; one
        with placeholders is taken as it is, a clip for each. time_markers: None is as processor_config.json says. Raises
        ValueError for bad sound, placeholders that don't match the clips, and more tokens than the model has positions.
        """
        config, waves = self.config, [load_audio(clip) for clip in clips]
        if not PLACEHOLDER.search(text):
            text = WRAP.format("".join(PIECES) * len(waves) + "\n" * bool(waves), text)
        stretches = PLACEHOLDER.split(text)
        if len(stretches) != len(waves) + 1:
            raise ValueError(f"the prompt has {len(stretches) - 1} audio placeholders for {len(waves)} clips")
        if broken := [piece for stretch in stretches for piece in PIECES if piece in stretch]:
            raise ValueError(f"the prompt has {broken[0]} outside of a whole placeholder, {''.join(PIECES)}")
        # Each stretch is tokenized on its own: BPE must not merge across a clip.
        tokens = [self.tokenizer.encode(stretch, add_special_tokens=False).ids for stretch in stretches]
        if config.adapter.audio_token_id in sum(tokens, []):
            raise ValueError(f"the prompt has the token of id {config.adapter.audio_token_id}, which stands for audio")
        markers = config.adapter.enable_time_marker if time_markers is None else time_markers
        ids = tokens[0]
        for wave, after in zip(waves, tokens[1:]):
            ids += audio_ids(count_tokens(len(wave) // HOP, config.encoder.n_window), config.adapter, markers) + after
        if len(ids) > (most := config.decoder.max_position_embeddings):
            raise ValueError(f"the prompt has {len(ids)} tokens; the model has {most} positions (max_position_embeddings)")
        return Prompt(torch.tensor(ids), [log_mel(wave) for wave in waves])

    def embed(self, prompt: Prompt) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """A prompt to what enters the decoder, [1, N, D], and the DeepStack rows for its first layers, [1, N, D] each."""
        ids = prompt.ids[None].to(self.lm_head.weight.device)
        x = self.language_model.embed_tokens(ids)
        if not prompt.mels:
            return x, []
        is_audio = ids == self.config.adapter.audio_token_id
        features, taps = self.audio_encoder(prompt.mels)
        mergers = zip(self.deepstack_audio_merger_list, taps)
        deepstack = [deepstack_rows(merger(tap), is_audio) for merger, tap in mergers]
        return splice(x, self.audio_adapter(features), is_audio), deepstack

    def forward(self, prompt: Prompt) -> torch.Tensor:
        """Logits of every position, float32 [N, V]."""
        x, deepstack = self.embed(prompt)
        positions = torch.arange(x.shape[1], device=x.device)[None]
        return self.lm_head(self.language_model(x, positions, deepstack=deepstack))[0].float()

    def generate(self, prompt: Prompt, max_new_tokens=1024, temperature=1.0, top_p=1.0, top_k=50, seed=None,
                 thinking_budget=None) -> Iterator[int]:  # fmt: skip
        """Generates token ids, the last of them a stop id unless max_new_tokens (cut to what fits) came first.

        The arguments are those of sample.Sampling. Raises ValueError, here and not at the first id, for one out of range and
        for a prompt that leaves no position free.
        """
        sampling = Sampling(max_new_tokens, temperature, top_p, top_k, seed, thinking_budget)
        most = self.config.decoder.max_position_embeddings
        free = most - len(prompt.ids)
        if free < 1:
            raise ValueError(f"the prompt has {len(prompt.ids)} tokens; to generate, at most {most - 1} fit in {most} positions")
        if max_new_tokens > free:
            warnings.warn(f"max_new_tokens cut from {max_new_tokens} to {free}: the model has {most} positions", stacklevel=2)
        return generate(self, prompt, replace(sampling, max_new_tokens=min(max_new_tokens, free)))

    def ask(self, clips, text: str, time_markers=None, max_new_tokens=1024, temperature=1.0, top_p=1.0, top_k=50, seed=None,
            thinking_budget=None) -> str:  # fmt: skip
        """The answer to a question about a clip or a list of clips; see prompt and generate for the arguments."""
        prompt = self.prompt(text, clips if isinstance(clips, (list, tuple)) else [clips], time_markers)
        ids = self.generate(prompt, max_new_tokens, temperature, top_p, top_k, seed, thinking_budget)
        return self.tokenizer.decode(list(ids))


# ---- command line ----


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(message)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("moss_min.py", description="Ask MOSS-Audio about sounds.", allow_abbrev=False)
    parser.add_argument("audio", nargs="*", metavar="AUDIO", help="sound files; - is a sound on stdin; none: a question alone")
    parser.add_argument("--model", required=True, metavar="FOLDER", help="a checkpoint folder")
    parser.add_argument("--prompt", metavar="TEXT", help="what to ask (default: Describe this audio.)")
    parser.add_argument("--device", default="auto", help="auto (default), cuda, mps or cpu")
    parser.add_argument("--dtype", default="auto", help="auto (default), float32, bfloat16 or float16")
    parser.add_argument("--max-new-tokens", type=int, default=Sampling.max_new_tokens, metavar="N", help="default: %(default)s")
    heat = parser.add_mutually_exclusive_group()
    heat.add_argument("--temperature", type=float, default=Sampling.temperature, metavar="X", help="default: %(default)s")
    heat.add_argument("--greedy", dest="temperature", action="store_const", const=0.0, help="always the likeliest token")
    parser.add_argument("--top-p", type=float, default=Sampling.top_p, metavar="X", help="default: %(default)s (no filter)")
    parser.add_argument("--top-k", type=int, default=Sampling.top_k, metavar="N", help="default: %(default)s; 0: no filter")
    parser.add_argument("--seed", type=int, metavar="N", help="for the same answer again")
    parser.add_argument("--no-time-markers", dest="time_markers", action="store_false", default=None, help="audio ids alone")
    parser.add_argument("--thinking-budget", type=int, metavar="N", help="end a thought after N tokens")
    parser.add_argument("--hide-thinking", action="store_true", help="print the answer alone")
    parser.add_argument("--quiet", action="store_true", help="nothing on stderr but errors and warnings")
    args = parser.parse_args(argv)
    if not args.audio and args.prompt is None:
        parser.error("nothing to do; expected a sound file or --prompt")
    return args


def peak_memory(device: torch.device) -> str:
    """The largest amount of memory this process has used: on CUDA the tensors', elsewhere all of it."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 1e9:.2f} GB"
    try:
        import resource  # not on Windows
    except ImportError:
        return "not known"
    kilo = 1 if sys.platform == "darwin" else 1024
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilo / 1e9:.2f} GB"


def run(args: argparse.Namespace) -> None:
    """Answers on stdout, as it is generated; tells on stderr how it goes."""
    report = (lambda line: None) if args.quiet else (lambda line: print(line, file=sys.stderr, flush=True))
    waves = []
    for name in args.audio:
        waves.append(load_audio(sys.stdin.buffer if name == "-" else name))
        report(f"{name}: {len(waves[-1]) / SAMPLE_RATE:.2f} s")
    model = MossAudio.from_pretrained(args.model, args.device, args.dtype, report)
    text = "Describe this audio." if args.prompt is None else args.prompt
    start = time.perf_counter()
    prompt = model.prompt(text, waves, args.time_markers)
    report(f"prompt: {len(prompt.ids)} tokens")
    ids = model.generate(prompt, args.max_new_tokens, args.temperature, args.top_p, args.top_k, args.seed, args.thinking_budget)
    times = []
    pieces = stream_text(model.tokenizer, (times.append(time.perf_counter()) or i for i in ids))
    if args.hide_thinking:
        pieces = stream_answer(pieces, opened="<think>" in text.rpartition("</think>")[2])
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
    finally:
        print(flush=True)
    if times:
        rate = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else 0
        first = f"first after {times[0] - start:.2f} s, then {rate:.1f} a second"
        report(f"{len(times)} new tokens, {first}; peak memory {peak_memory(model.lm_head.weight.device)}")


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    warnings.formatwarning = lambda message, *_: f"moss_min: {message}\n"
    try:
        run(parse(argv))
    except (ValueError, MemoryError, torch.OutOfMemoryError) as error:
        print(f"moss_min: {' '.join(str(error).split()):.380}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read the answer has heard enough; stdout is flushed once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
