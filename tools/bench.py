"""Measures the model: python tools/bench.py [--model FOLDER | --shape 4B|8B|small] [--peer] [--json] [--lengths].

One clip (noise with gaps), one prompt, a greedy answer that no stop id ends. Medians over repeats, after a warm-up.

stage     what is timed                                              share_of_limit is of
loading   from_pretrained, the files in the system's cache           a plain read of the files
log_mel   the waveform to log-mel, always on the CPU                 numpy's product of float64 matrices
encoding  log-mel to the encoder's output and taps                   a product of matrices in the model's type
prefill   adapters, decoder over the prompt, the first token         the same
decoding  the steps after it, each taken to be the median one        the bandwidth: of summing the same weights on a
                                                                     CPU, else of a copy (bytes read and written)

Where the limit is a product, the work is FLOPs: two for each multiplication with its addition in matrices, convolutions
(the chunks' padding too) and attention (the keys a token sees), and in log-mel the FFT's 2.5 n log2 n. In decoding it
is bytes: the decoder layers' matrices, lm_head, and the keys and values so far. Peak memory, of one load and one
answer, is CUDA's, else the process's. --shape has random weights, saved as bfloat16 to be loaded.

--peer: transformers 4.57.1 does the same in turn, on the same tensors: WhisperFeatureExtractor in numpy,
WhisperEncoderLayer between our stem and final norm, Qwen3ForCausalLM behind our adapters. ratio_to_peer is our time
over its time; of loading, which it does for the decoder alone, the times per byte (on a CPU, of a file in the model's
type it loads nothing: it maps the file, to be read in use). --lengths runs clips of several lengths instead, once each
(up to two minutes the second of two), and prints how the cost grows."""

import argparse, datetime, gc, importlib.metadata, json, math, platform, re, shutil, statistics, sys, tempfile, time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
from encoder import HOP, N_FFT, N_MELS, SAMPLE_RATE, STRIDE, AudioEncoder, log_mel, require
from moss_min import (
    DTYPES,
    TINY,
    MossAudio,
    MossConfig,
    Prompt,
    load_tokenizer,
    out_of_memory,
    peak_bytes,
    pick_device,
    read_config,
)
from train import save_checkpoint

STAGES = "loading", "log_mel", "encoding", "prefill", "decoding"
LENGTHS = 10, 30, 120, 600, 2820  # seconds of clip; the context ends at about 47 minutes
TEXT = "Transcribe the audio with timestamps."
PEER = "4.57.1"  # of transformers

# ---- shapes ----
AUDIO = {
    "d_model": 1280,
    "output_dim": 1280,
    "encoder_layers": 32,
    "encoder_attention_heads": 20,
    "encoder_ffn_dim": 5120,
    "downsample_hidden_size": 480,
    "deepstack_encoder_layer_indexes": [8, 16, 24],
}
LANGUAGE = {
    "vocab_size": 151_936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
SHAPES = {  # name -> audio_config, language_config, adapter_hidden_size; small: Qwen3-0.6B's with twelve layers
    "4B": (AUDIO, LANGUAGE, 8192),
    "8B": (AUDIO, LANGUAGE | {"hidden_size": 4096, "intermediate_size": 12_288}, 8192),
    "small": (
        AUDIO
        | {
            "d_model": 768,
            "output_dim": 768,
            "encoder_layers": 8,
            "encoder_attention_heads": 12,
            "encoder_ffn_dim": 3072,
            "deepstack_encoder_layer_indexes": [2, 4, 6],
        },
        LANGUAGE
        | {
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 16,
        },
        8192,
    ),
}


def write_config(shape: str, folder: Path) -> Path:
    """A checkpoint folder of that shape without its weights: tiny/'s files, so also its tokenizer, which is smaller."""
    shutil.copytree(
        TINY,
        folder,
        ignore=shutil.ignore_patterns("*.safetensors", "*.wav", "processor_config.json"),
    )
    config, (audio, language, width) = (
        json.loads((folder / "config.json").read_text("utf-8")),
        SHAPES[shape],
    )
    config["audio_config"] |= audio
    config["language_config"] |= language
    (folder / "config.json").write_text(
        json.dumps(config | {"adapter_hidden_size": width}), "utf-8"
    )
    return folder


def random_model(folder: Path, device: torch.device, dtype: torch.dtype) -> MossAudio:
    """A model of that folder's shape, made on the device: norms' weights are 1, all else normal, of deviation 0.02."""
    with torch.device("meta"):
        model = MossAudio(read_config(folder), load_tokenizer(folder)).requires_grad_(False).eval()
    model = model.to(dtype).to_empty(device=device)
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        weight.fill_(1) if name.endswith("norm.weight") else weight.normal_(std=0.02)
    return model


def sound(seconds: float) -> torch.Tensor:
    """Noise in bursts of 0.7 s with gaps of 0.3 s, the same ten seconds again and again: float32 [samples]."""
    noise = np.random.default_rng(0).normal(0, 0.1, (10, SAMPLE_RATE)).astype(np.float32)
    noise[:, 7 * SAMPLE_RATE // 10 :] = 0
    return torch.from_numpy(np.resize(noise, round(seconds * SAMPLE_RATE)))


# ---- the work ----
def mel_flops(frames: int) -> float:
    return frames * (2.5 * N_FFT * math.log2(N_FFT) + 2 * N_MELS * (N_FFT // 2 + 1))


def encoding_flops(config: MossConfig, frames: int) -> int:
    """Of one clip of `frames` mel frames through the encoder."""
    c, channels, D = config.encoder, config.encoder.downsample_hidden_size, config.encoder.d_model
    chunks, t = (
        math.ceil(frames / (2 * c.n_window)),
        min(frames, 2 * c.n_window),
    )  # padded to the longest
    t1, t2, L = (
        math.ceil(t / 2),
        math.ceil(t / 4),
        math.ceil(t / STRIDE),
    )  # frames after each convolution
    stem = 9 * channels * (64 * t1 + channels * (32 * t2 + 16 * L)) + L * 16 * channels * D
    layer = (
        L * (4 * D * D + 2 * D * c.encoder_ffn_dim) + 2 * L * L * D
    )  # projections and MLP; scores and their sums
    outputs = 1 + len(c.deepstack_encoder_layer_indexes)
    out_proj = 0 if c.output_dim == D else outputs * L * D * c.output_dim
    return 2 * chunks * (stem + c.encoder_layers * layer + out_proj)


def prefill_flops(config: MossConfig, audio: int, tokens: int) -> int:
    """Of a prompt of so many tokens, `audio` of them audio tokens, through adapters, decoder and, the last, lm_head."""
    a, c = config.adapter, config.decoder
    outputs = 1 + len(config.encoder.deepstack_encoder_layer_indexes)
    adapters = outputs * audio * a.adapter_hidden_size * (2 * a.output_dim + a.hidden_size)
    queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    layer = tokens * c.hidden_size * (2 * queries + 2 * keys + 3 * c.intermediate_size)
    layer += (
        tokens * (tokens + 1) * queries
    )  # a token sees itself and all before it; scores and their sums
    return 2 * (adapters + c.num_hidden_layers * layer + c.hidden_size * c.vocab_size)


def step_linears(model: MossAudio) -> list[nn.Linear]:
    """What a decoding step multiplies by, that is reads: the layers' projections and lm_head."""
    return [
        part
        for part in (*model.language_model.layers.modules(), model.lm_head)
        if isinstance(part, nn.Linear)
    ]


def weight_bytes(model: MossAudio) -> int:
    return sum(linear.weight.nbytes for linear in step_linears(model))


def cache_bytes(model: MossAudio, keys: float) -> float:
    """Keys and values of so many tokens."""
    c = model.config.decoder
    return (
        2
        * c.num_hidden_layers
        * c.num_key_value_heads
        * c.head_dim
        * keys
        * model.lm_head.weight.itemsize
    )


# ---- clocks ----
def now(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def seconds_of(work: Callable, device: torch.device) -> float:
    start = now(device)
    result = work()
    end = now(device)
    del result  # freeing it is not part of the work
    return end - start


def answer_seconds(
    model: MossAudio, prompt: Prompt, args: argparse.Namespace, report=None
) -> list[float]:
    """One answer's encoding, prefill (making the cache, too) and median step: the first step may prepare the others, as
    a CUDA graph does."""
    free = model.config.decoder.max_position_embeddings - len(prompt.ids)
    require(
        args.new_tokens <= free,
        f"--new-tokens is {args.new_tokens}; expected at most {free} after this prompt",
    )
    device, times = model.lm_head.weight.device, []
    hooks = [
        model.audio_encoder.register_forward_pre_hook(lambda *_: times.append(now(device))),
        model.audio_encoder.register_forward_hook(lambda *_: times.append(now(device))),
    ]
    times.append(now(device))
    for _ in model.generate(
        prompt, args.new_tokens, temperature=0, cuda_graph=args.cuda_graph, report=report
    ):
        times.append(time.perf_counter())  # the id is here, so the device is done
    for hook in hooks:
        hook.remove()
    start, begun, encoded, first, *_ = times
    return [encoded - begun, begun - start + first - encoded, statistics.median(np.diff(times[3:]))]


MARK = Path(
    "/proc/self/clear_refs"
)  # where Linux lets a process lower its high-water mark to what it holds now


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif MARK.exists():
        MARK.write_text("5")


def peak_since(device: torch.device) -> int:
    """The most memory held since reset_peak or, where that can't be (a CPU or MPS without Linux), ever."""
    if device.type == "cuda" or not MARK.exists():
        return peak_bytes(device)
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


# ---- limits ----
def limit_works(model: MossAudio) -> dict[str, tuple[Callable, float]]:
    """By name, what can't go faster on this machine, and its FLOPs or bytes."""
    weight, linears = model.lm_head.weight, step_linears(model)
    n = 2048 if weight.device.type == "cpu" else 8192
    matrix, wide = (
        weight.new_empty(n, n).normal_(),
        np.random.default_rng(0).normal(size=(1024, 1024)),
    )
    works = {
        "matrix product": (lambda: matrix @ matrix, 2 * n**3),
        "float64 product": (lambda: wide @ wide, 2 * 1024**3),
    }
    if weight.device.type != "cpu":
        a, b = (torch.ones(1 << 30, dtype=torch.uint8, device=weight.device) for _ in range(2))
        return works | {"copy": (lambda: [b.copy_(a) for _ in range(10)], 20 * a.nbytes)}
    words = [
        linear.weight.view(-1).view(torch.float32) for linear in linears
    ]  # float16s in pairs: no conversion
    rows = [weight.new_ones(1, 1, linear.in_features) for linear in linears]
    multiply = lambda: [
        linear(row) for linear, row in zip(linears, rows)
    ]  # by one row, as in a decoding step
    return works | {
        "sum": (lambda: [word.sum() for word in words], weight_bytes(model)),
        "one-row product": (multiply, weight_bytes(model)),
    }


def read_files(paths: list[Path], buffer: bytearray) -> None:
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


# ---- transformers ----
def require_peer() -> None:
    """Raises ValueError if it's not there; without importing it, which would count as our memory."""
    try:
        found = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        found = "not installed"
    require(
        found == PEER,
        f"--peer: transformers is {found}; expected {PEER} (pip install transformers=={PEER})",
    )


def peer_config(config: MossConfig):
    """transformers' configuration of the decoder."""
    from transformers import Qwen3Config

    fixed = {"attention_bias": False, "tie_word_embeddings": False, "attn_implementation": "sdpa"}
    return Qwen3Config(
        **vars(config.decoder), **fixed, eos_token_id=None
    )  # no stop id for it, either


def write_peer(folder: Path, out: Path) -> Path:
    """A checkpoint's decoder as transformers' own, shard by shard."""
    peer_config(read_config(folder)).save_pretrained(out)
    weight_map = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors = {
            name.replace("language_model.", "model."): tensor
            for name, tensor in load_file(path).items()
            if name.startswith(("language_model.", "lm_head."))
        }
        if tensors:
            save_file(tensors, out / path.name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, path.name)
    (out / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return out


class Clock:
    """A streamer, which transformers' generate gives each token as it comes."""

    def __init__(self):
        self.times = []

    def put(self, ids: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class Peer:
    """transformers' parts, made of the model's own tensors."""

    def __init__(self, model: MossAudio):
        from transformers import Qwen3ForCausalLM, WhisperConfig, WhisperFeatureExtractor
        from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding
        from transformers.models.whisper.modeling_whisper import WhisperEncoderLayer

        class Layer(WhisperEncoderLayer):
            def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
                return super().forward(x, mask, None)[0]

        self.model, c = model, model.config.encoder
        whisper = WhisperConfig(
            d_model=c.d_model,
            encoder_attention_heads=c.encoder_attention_heads,
            encoder_ffn_dim=c.encoder_ffn_dim,
            attn_implementation="sdpa",
        )
        self.extractor = WhisperFeatureExtractor(feature_size=N_MELS)
        with torch.device("meta"):
            self.encoder, self.decoder = (
                AudioEncoder(c),
                Qwen3ForCausalLM(peer_config(model.config)).eval(),
            )
            self.encoder.layers = nn.ModuleList(
                Layer(whisper) for _ in range(c.encoder_layers)
            ).eval()
        self.encoder.load_state_dict(model.audio_encoder.state_dict(), assign=True)
        weights = {
            f"model.{name}": weight for name, weight in model.language_model.state_dict().items()
        }
        self.decoder.load_state_dict(
            weights | {"lm_head.weight": model.lm_head.weight}, assign=True
        )
        rotary = Qwen3RotaryEmbedding(
            self.decoder.config, model.lm_head.weight.device
        )  # its table is in no file
        self.decoder.model.rotary_emb = rotary

    def log_mel(self, wave: torch.Tensor) -> torch.Tensor:
        mel = self.extractor._np_extract_fbank_features(wave.numpy()[None], "cpu")[0]
        return torch.from_numpy(mel).to(torch.bfloat16)

    def prefill(
        self, prompt: Prompt, output: torch.Tensor, taps: list[torch.Tensor]
    ) -> torch.Tensor:
        """The prompt's last logits, [1, 1, V]; the DeepStack rows are made, but it has no place for them."""
        x, _ = self.model.embed_ids(prompt.ids[None].to(output.device), output, taps)
        return self.decoder(inputs_embeds=x, use_cache=True, logits_to_keep=1).logits

    def step_seconds(self, prompt: Prompt, output: torch.Tensor, new_tokens: int) -> float:
        """generate's median step after the first token."""
        x, _ = self.model.embed_ids(prompt.ids[None].to(output.device), output)
        mask, clock = torch.ones(x.shape[:2], dtype=torch.long, device=x.device), Clock()
        self.decoder.generate(
            inputs_embeds=x,
            attention_mask=mask,
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
            streamer=clock,
        )
        return statistics.median(
            np.diff(clock.times[-new_tokens:])
        )  # the first one told of is the prompt, without ids

    def seconds(
        self, wave: torch.Tensor, prompt: Prompt, sounds: tuple, new_tokens: int
    ) -> list[float]:
        """Of every stage but loading; sounds: what the encoder gave."""
        device = sounds[0].device
        return [
            seconds_of(lambda: self.log_mel(wave), device),
            seconds_of(lambda: self.encoder(prompt.mels), device),
            seconds_of(lambda: self.prefill(prompt, *sounds), device),
            self.step_seconds(prompt, sounds[0], new_tokens),
        ]


# ---- runs ----
def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def open_model(args: argparse.Namespace, temp: Path) -> tuple[Path | None, MossAudio | None]:
    """The checkpoint folder to load, or the model itself, where the disk has no room for one of that shape."""
    if not args.shape:
        return args.model or TINY, None
    device = pick_device(args.device)
    require(args.dtype in DTYPES, f"dtype is {args.dtype!r}; expected {', '.join(DTYPES)}")
    dtype = DTYPES[args.dtype] or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    source = write_config(args.shape, temp / "config")
    say(f"making random weights, {args.shape}")
    model = random_model(source, device, dtype)
    size, free = (
        2 * sum(weight.numel() for weight in model.parameters()),
        shutil.disk_usage(temp).free,
    )
    if free < 1.1 * size * (2 if args.peer else 1):
        say(
            f"loading is not measured: {temp} has {free / 1e9:.1f} GB free for weights of {size / 1e9:.1f} GB"
        )
        return None, model
    say(f"saving them, {size / 1e9:.2f} GB")
    save_checkpoint(model, temp / "checkpoint", source)
    return temp / "checkpoint", None


def load(folder: Path, args: argparse.Namespace) -> MossAudio:
    return MossAudio.from_pretrained(folder, args.device, args.dtype)


def endless(model: MossAudio) -> MossAudio:
    """The model without stop ids: each answer is as long as asked."""
    model.config = model.config._replace(stop_ids=())
    return model


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def measure_loading(
    folder: Path, args: argparse.Namespace, temp: Path, dtype: torch.dtype
) -> tuple[list, list, list]:
    """Seconds of loading, of a plain read, and of the peer's loading, scaled to as many bytes. Nothing stays loaded."""
    device, paths, buffer = (
        pick_device(args.device),
        sorted(folder.glob("*.safetensors")),
        bytearray(1 << 24),
    )
    works = [lambda: load(folder, args), lambda: read_files(paths, buffer)]
    if args.peer:
        from transformers import Qwen3ForCausalLM

        other = write_peer(folder, temp / "peer")
        options = {"dtype": dtype, "attn_implementation": "sdpa"}
        works.append(lambda: Qwen3ForCausalLM.from_pretrained(other, **options).to(device))
    times = [[] for _ in works]
    for i in range(args.repeats + 1):  # number 0 is to warm up
        say(f"loading {i} of {args.repeats}")
        for work, seconds in zip(works, times):
            seconds.append(seconds_of(work, device))
            gc.collect()
    ours, reads, *peers = (seconds[1:] for seconds in times)
    return (
        ours,
        reads,
        [seconds * size_of(folder) / size_of(other) for seconds in peers[0]] if args.peer else [],
    )


def measure(args: argparse.Namespace, temp: Path) -> dict:
    """What --json prints and, for the table, the limits, the prompt's length and the peer's memory."""
    device, wave = pick_device(args.device), sound(args.seconds)
    folder, model = open_model(args, temp)
    reset_peak(device)
    model = endless(model or load(folder, args))
    dtype, prompt = model.lm_head.weight.dtype, model.prompt(TEXT, [wave])
    say("warming up")
    answer_seconds(model, prompt, args)
    peak, peer_peak, reads = peak_since(device), None, []
    ours, peers = ({name: [] for name in STAGES} for _ in range(2))
    if folder:
        model = None  # one at a time
        ours["loading"], reads, peers["loading"] = measure_loading(folder, args, temp, dtype)
        model = endless(load(folder, args))
    answers = [
        (
            ours,
            lambda: [
                seconds_of(lambda: log_mel(wave), device),
                *answer_seconds(model, prompt, args),
            ],
        )
    ]
    if args.peer:
        peer = Peer(model)
        sounds = peer.encoder(prompt.mels)
        answers.append((peers, lambda: peer.seconds(wave, prompt, sounds, args.new_tokens)))
        reset_peak(device)
        peer.seconds(wave, prompt, sounds, args.new_tokens)
        peer_peak = peak_since(device)
    limits = limit_works(model)
    rates = {name: [] for name in limits}
    for i in range(args.repeats):
        say(f"answering {i + 1} of {args.repeats}")
        for times, answer in (
            answers if i % 2 else answers[::-1]
        ):  # in turn, or the second would find the caches warmer
            for name, seconds in zip(STAGES[1:], answer()):
                times[name].append(seconds)
        for name, (work, amount) in limits.items():
            work()  # to warm up
            rates[name].append(amount / seconds_of(work, device))
    size = size_of(folder) if folder else 0
    rates["read"] = [size / seconds for seconds in reads]
    limits = {name: statistics.median(values) for name, values in rates.items() if values}
    frames, tokens, steps = len(wave) // HOP, len(prompt.ids), args.new_tokens - 1
    audio = int((prompt.ids == model.config.adapter.audio_token_id).sum())
    weights, cache = (
        weight_bytes(model),
        cache_bytes(model, tokens + args.new_tokens / 2),
    )  # the cache as it is halfway
    works = {  # how much is done, the unit of its rate, the FLOPs or bytes, the limit for these
        "loading": (size / 1e9, "GB/s", size, "read"),
        "log_mel": (args.seconds, "s of sound/s", mel_flops(frames), "float64 product"),
        "encoding": (
            audio,
            "audio tokens/s",
            encoding_flops(model.config, frames),
            "matrix product",
        ),
        "prefill": (
            tokens,
            "tokens/s",
            prefill_flops(model.config, audio, tokens),
            "matrix product",
        ),
        "decoding": (
            steps,
            "tokens/s",
            steps * (weights + cache),
            "sum" if device.type == "cpu" else "copy",
        ),
    }
    stages = dict.fromkeys(STAGES)
    for name, (amount, unit, work, limit) in works.items():
        if ours[name]:
            seconds = statistics.median(ours[name]) * (steps if name == "decoding" else 1)
            stages[name] = {
                "seconds": seconds,
                "rate": amount / seconds,
                "unit": unit,
                "share_of_limit": work / seconds / limits[limit],
            }
            if args.peer:
                stages[name]["ratio_to_peer"] = statistics.median(ours[name]) / statistics.median(
                    peers[name]
                )
    return about(model, args) | {
        "peak_bytes": peak,
        "stages": stages,
        "limits": limits,
        "tokens": tokens,
        "peer_peak": peer_peak,
        "limit_of": {name: work[3] for name, work in works.items()},
    }


def measure_lengths(args: argparse.Namespace, temp: Path) -> dict:
    """A run of each length or, up to two minutes, a second one, which warm caches make steadier."""
    folder, model = open_model(args, temp)
    model = endless(model or load(folder, args))
    device, rows = model.lm_head.weight.device, []
    answer_seconds(model, model.prompt(TEXT, [sound(4)]), args)
    for length in args.lengths or LENGTHS:
        say(f"{length:g} s of sound")
        wave = sound(length)
        reset_peak(device)
        prompt, mel_seconds = model.prompt(TEXT, [wave]), seconds_of(lambda: log_mel(wave), device)
        for _ in range(2 if length <= 120 else 1):
            encoding, prefill, step = answer_seconds(model, prompt, args, say)
        weights = sum(weight.nbytes for weight in model.parameters())
        held = weights + cache_bytes(model, len(prompt.ids) + args.new_tokens - 1)
        rows.append(
            {
                "length": length,
                "tokens": len(prompt.ids),
                "log_mel": mel_seconds,
                "encoding": encoding,
                "prefill": prefill,
                "step": step,
                "peak_bytes": peak_since(device),
                "weights_and_cache": held,
            }
        )
    return about(model, args) | {"lengths": rows}


# ---- command line ----
JSON = (
    "device",
    "dtype",
    "shape",
    "versions",
    "threads",
    "peak_bytes",
    "stages",
    "lengths",
)  # what --json prints


def about(model: MossAudio, args: argparse.Namespace) -> dict:
    weight, versions = (
        model.lm_head.weight,
        {"python": platform.python_version(), "torch": torch.__version__},
    )
    versions |= {"numpy": np.__version__} | ({"transformers": PEER} if args.peer else {})
    return {
        "device": torch.cuda.get_device_name(weight.device)
        if weight.is_cuda
        else weight.device.type,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "shape": args.shape or Path(args.model or TINY).name,
        "versions": versions,
        "threads": torch.get_num_threads(),
    }


def processor() -> str:
    cpu = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpu.read_text()) if cpu.exists() else None
    return found[1] if found else platform.machine()


def table(found: dict, args: argparse.Namespace) -> str:
    """Markdown: what ran where and when, a row for each stage or length, and what they were held against."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    title = (
        f"{found['shape']}, {found['dtype']}, {found['device']} ({processor()}, {found['threads']} threads), "
        f"{versions}, {datetime.date.today()}"
    )
    if "lengths" in found:
        head = (
            "clip",
            "prompt",
            "log-mel",
            "encoding",
            "prefill",
            "decoding step",
            "peak memory",
            "weights and cache",
        )
        forms = (
            "{:g} s",
            "{} tokens",
            "{:.3g} s",
            "{:.3g} s",
            "{:.3g} s",
            "{:.3g} s",
            "{:.3g} GB",
            "{:.3g} GB",
        )
        rows = [
            [
                form.format(value / 1e9 if "GB" in form else value)
                for form, value in zip(forms, row.values())
            ]
            for row in found["lengths"]
        ]
        return f"{title}\n\n{markdown(head, rows)}"
    head, rows = (
        ("stage", "time", "rate", "share of limit", *["time over transformers'"] * args.peer),
        [],
    )
    stages = {name: stage for name, stage in found["stages"].items() if stage}
    for name, stage in stages.items():
        ratio = [f"{stage['ratio_to_peer']:.2f}"] if args.peer else []
        rows.append(
            (
                name,
                f"{stage['seconds']:.4g} s",
                f"{stage['rate']:.4g} {stage['unit']}",
                f"{stage['share_of_limit']:.1%} of {found['limit_of'][name]}",
                *ratio,
            )
        )
    first = sum(stages[name]["seconds"] for name in ("log_mel", "encoding", "prefill"))
    other = f", with transformers' parts {found['peer_peak'] / 1e9:.2f} GB" if args.peer else ""
    limits = (
        f"{name} {limit / 1e9:.4g} G{'FLOP' if name.startswith(('matrix', 'float64')) else 'B'}/s"
        for name, limit in found["limits"].items()
    )
    return (
        f"{title}\n\n{markdown(head, rows)}\n\n{args.seconds:g} s of sound, {found['tokens']} prompt tokens, "
        f"{args.new_tokens} new ones, the first after {first:.4g} s. Peak memory: "
        f"{found['peak_bytes'] / 1e9:.2f} GB{other}. Limits: {', '.join(limits)}."
    )


def markdown(head: tuple, rows: list[tuple]) -> str:
    lines = (
        f"| {' | '.join(row)} |" for row in (head, ("---", *["---:"] * (len(head) - 1)), *rows)
    )
    return "\n".join(lines)


@torch.no_grad()
def run(args: argparse.Namespace) -> None:
    for seconds in (args.seconds, *(args.lengths or ())):
        require(
            0.01 <= seconds <= 86_400,
            f"a clip of {seconds:g} s; expected 0.01 (one frame) to 86400 (a day)",
        )
    require(
        args.new_tokens >= 2,
        f"--new-tokens is {args.new_tokens}; expected at least 2, the second being a step",
    )
    require(args.repeats >= 1, f"--repeats is {args.repeats}; expected at least 1")
    require(
        args.threads is None or args.threads >= 1,
        f"--threads is {args.threads}; expected at least 1",
    )
    require(not args.peer or args.lengths is None, "expected --peer or --lengths, not both")
    if args.peer:
        require_peer()
    if args.threads:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(prefix="moss-bench-") as temp:
        found = (measure if args.lengths is None else measure_lengths)(args, Path(temp))
    shown = (
        json.dumps({name: found[name] for name in JSON if name in found})
        if args.json
        else table(found, args)
    )
    print(shown, flush=True)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser("bench.py", allow_abbrev=False)
    parser.error, add = lambda message: require(False, message), parser.add_argument
    source = parser.add_mutually_exclusive_group().add_argument
    source(
        "--model", type=Path, metavar="FOLDER", help="checkpoint folder (the small one in tiny/)"
    )
    source(
        "--shape",
        choices=SHAPES,
        help="random weights of a released model's dimensions, or of a small model's",
    )
    add("--device", default="auto", help="auto (the first that is there of), cuda, mps, cpu")
    add(
        "--dtype",
        default="auto",
        help="auto (float32 on a CPU, else the checkpoint's), float32, bfloat16, float16",
    )
    add("--seconds", type=float, default=30, metavar="X", help="length of the clip (%(default)s)")
    add(
        "--new-tokens",
        type=int,
        default=128,
        metavar="N",
        help="length of the answer (%(default)s)",
    )
    add(
        "--repeats",
        type=int,
        default=6,
        metavar="N",
        help="how often each stage is timed (%(default)s)",
    )
    add(
        "--threads",
        type=int,
        metavar="N",
        help="torch's threads; numpy's are set by OMP_NUM_THREADS",
    )
    add(
        "--no-cuda-graph",
        dest="cuda_graph",
        action="store_false",
        help="on CUDA, launch each step's kernels anew",
    )
    add("--peer", action="store_true", help=f"compare with transformers {PEER}")
    add(
        "--lengths",
        type=float,
        nargs="*",
        metavar="X",
        help="instead: how cost grows with the clip, {} s".format(", ".join(map(str, LENGTHS))),
    )
    add("--json", action="store_true", help="print one JSON object, not a table")
    try:
        run(parser.parse_args(argv))
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if not isinstance(error, (ValueError, OSError)) and not out_of_memory(error):
            raise
        print(f"bench: {' '.join(str(error).split()):.380}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
