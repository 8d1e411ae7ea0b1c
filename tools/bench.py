"""Measures how fast each stage is, and how near to the limit that the machine sets.

    python tools/bench.py --shape small --threads 2

One clip (noise with gaps) and one prompt; medians over --repeats, after a warm-up.

stage     what is timed                                      the limit is the speed of
loading   from_pretrained, the files in the page cache       reading the files
log_mel   the waveform to log-mel, on the CPU                numpy's product of float64 matrices
encoding  log-mel to the encoder's output and taps           a product of matrices
prefill   adapters and decoder, to the first token's logits  the same
decoding  the steps after it                                 summing the weights (CPU), or a copy
batch     steps of --batch rows, as many tokens in all       the same

The work is counted in FLOPs, by torch's counter (on a CPU without attention), or in bytes: the
weights that a step reads, keys and values. Peak memory is CUDA's, or the process's with the files
that it maps. --shape has random weights, saved as bfloat16. With --peer, transformers 4.57.1 does
the same with the same weights: WhisperFeatureExtractor, WhisperEncoderLayer between our stem and
final norm, Qwen3ForCausalLM behind our adapters; of loading, times per byte are compared.
With --lengths, clips are run once each, those of up to two minutes after a warm-up."""

import argparse
import datetime
import importlib.metadata
import json
import platform
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import moss_min
from adapter import splice
from common import random_model, say
from encoder import HOP, N_FFT, N_MELS, SAMPLE_RATE, AudioEncoder, log_mel, require
from moss_min import TINY, MossAudio, Prompt, Step, pick_device, read_config
from train import copy_all_but_weights, save_checkpoint

LENGTHS = [10, 30, 120, 600, 2820]  # seconds; the context ends at about 47 minutes
TEXT = "Transcribe the audio with timestamps."
PEER = "4.57.1"  # of transformers

# ---- shapes and sound ----

AUDIO = {"d_model": 1280, "output_dim": 1280, "encoder_ffn_dim": 5120, "encoder_layers": 32}
AUDIO |= {"encoder_attention_heads": 20, "downsample_hidden_size": 480}
AUDIO |= {"deepstack_encoder_layer_indexes": [8, 16, 24]}
LANGUAGE = {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36}
LANGUAGE |= {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
LANGUAGE |= {"vocab_size": 151_936}
SMALL_AUDIO = {"d_model": 768, "output_dim": 768, "encoder_ffn_dim": 3072, "encoder_layers": 8}
SMALL_AUDIO |= {"encoder_attention_heads": 12, "deepstack_encoder_layer_indexes": [2, 4, 6]}
# Qwen3-0.6B's decoder, with twelve layers.
SMALL = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 12}
SMALL |= {"num_attention_heads": 16}
SHAPES = {
    "4B": (AUDIO, LANGUAGE),
    "8B": (AUDIO, LANGUAGE | {"hidden_size": 4096, "intermediate_size": 12_288}),
    "small": (AUDIO | SMALL_AUDIO, LANGUAGE | SMALL),
}


def write_config(shape: str, folder: Path) -> Path:
    """Makes a checkpoint folder of that shape without weights; its tokenizer is tiny/'s."""
    copy_all_but_weights(TINY, folder)
    (folder / "processor_config.json").unlink()  # it has tiny/'s ids, not the released ones
    audio, language = SHAPES[shape]
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["audio_config"] |= audio
    config["language_config"] |= language
    config["adapter_hidden_size"] = 8192
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    return folder


def sound(seconds: float) -> Tensor:
    """Returns noise in bursts of 0.7 s with gaps of 0.3 s, the same every 10 s: [samples]."""
    noise = np.random.default_rng(0).normal(0, 0.1, (10, SAMPLE_RATE)).astype(np.float32)
    noise[:, 7 * SAMPLE_RATE // 10 :] = 0
    return torch.from_numpy(np.resize(noise, round(seconds * SAMPLE_RATE)))


# ---- the stages: what is timed ----


def our_stages(model: MossAudio, wave: Tensor, prompt: Prompt) -> dict[str, Callable]:
    """Returns the work of each stage up to the first token."""
    heard = []

    def encoding() -> None:
        heard[:] = model.hear(prompt.mels)

    def prefill() -> Tensor:
        # prefill would hear the sound, which is a stage of its own.
        with mock.patch.object(model, "hear", lambda *_: heard):
            return model.prefill(prompt, model.new_cache(1, len(prompt.ids)))

    return {"log_mel": lambda: log_mel(wave), "encoding": encoding, "prefill": prefill}


def count_steps(rows: int, args: argparse.Namespace) -> int:
    return max(1, (args.new_tokens - 1) // rows)


def make_steps(step: Callable, rows: int, start: int, args: argparse.Namespace) -> Callable:
    """Returns the work of greedy steps of so many rows: step takes ids [B, 1] and their position,
    from start on, to logits [B, V]."""

    def work() -> None:
        ids = [[0]] * rows
        for position in range(start, start + count_steps(rows, args)):
            # The ids go to the host and back, as in an answer.
            ids = step(torch.tensor(ids), position).argmax(-1, keepdim=True).tolist()

    return work


def our_steps(model: MossAudio, start: int, rows: int, args: argparse.Namespace) -> Callable:
    """Returns the work of steps behind a prompt. The cache has zeros for it: what a cache holds
    makes no difference to the time."""
    cache = model.new_cache(rows, start + count_steps(rows, args))
    model_step = Step(model, cache, [start] * rows, args.cuda_graph)

    def step(ids: Tensor, position: int) -> Tensor:
        # Each repeat goes over the same positions.
        model_step.positions.fill_(position)
        model_step.in_use = position
        return model_step(*ids.flatten().tolist())

    return make_steps(step, rows, start, args)


def load_peer(folder: Path, like: Tensor) -> nn.Module:
    """Loads a checkpoint's decoder by transformers, which passes over the other tensors."""
    from transformers import Qwen3Config, Qwen3ForCausalLM, logging

    class Decoder(Qwen3ForCausalLM):
        # Or it would guess, from names that are not mapped yet, what is missing before them.
        base_model_prefix = ""

    logging.set_verbosity_error()
    config = Qwen3Config(**vars(read_config(folder).decoder), tie_word_embeddings=False)
    options = {"config": config, "dtype": like.dtype, "key_mapping": {"^language_model": "model"}}
    return Decoder.from_pretrained(folder, **options).to(like.device)


def peer_stages(model: MossAudio, folder: Path, wave: Tensor, prompt: Prompt, args) -> dict:
    """Returns the work of each stage by transformers, with the same weights."""
    from transformers import DynamicCache, WhisperConfig, WhisperFeatureExtractor
    from transformers.models.whisper.modeling_whisper import WhisperEncoderLayer

    class Layer(WhisperEncoderLayer):
        def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
            return super().forward(x, mask, None)[0]

    extractor = WhisperFeatureExtractor(feature_size=N_MELS)
    sizes = {}
    for name in ("d_model", "encoder_attention_heads", "encoder_ffn_dim"):
        sizes[name] = getattr(model.config.encoder, name)
    whisper = WhisperConfig(**sizes, attn_implementation="sdpa")
    with torch.device("meta"):
        encoder = AudioEncoder(model.config.encoder)
        encoder.layers = nn.ModuleList(Layer(whisper) for _ in encoder.layers)
    encoder.eval().load_state_dict(model.audio_encoder.state_dict(), assign=True)
    decoder = load_peer(folder, model.lm_head.weight)
    output, *taps = model.hear(prompt.mels)
    ids = prompt.ids[None].to(decoder.device)  # [1, N]

    def prefill() -> Tensor:
        # Its decoder has no place for DeepStack's rows, but they are made.
        for merger, tap in zip(model.deepstack_audio_merger_list, taps):
            merger(tap)
        x = model.language_model.embed_tokens(ids)
        is_audio = ids == model.config.adapter.audio_token_id
        x = splice(x, model.audio_adapter(output), is_audio)  # [1, N, D]
        return decoder(inputs_embeds=x, use_cache=True, logits_to_keep=1).logits[:, -1].float()

    cache = DynamicCache()
    decoder(input_ids=ids, past_key_values=cache, logits_to_keep=1)

    def step(ids: Tensor, position: int) -> Tensor:
        cache.crop(position)  # without what an earlier run has added
        return decoder(input_ids=ids.to(decoder.device), past_key_values=cache).logits[:, -1]

    return {
        "loading": lambda: load_peer(folder, model.lm_head.weight),
        "log_mel": lambda: extractor._np_extract_fbank_features(wave.numpy()[None], "cpu"),
        "encoding": lambda: encoder(prompt.mels),
        "prefill": prefill,
        "decoding": make_steps(step, 1, ids.shape[1], args),
    }


# ---- the limits, and how much of them the stages need ----


def read_files(folder: Path) -> None:
    buffer = bytearray(1 << 24)
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def step_weights(model: MossAudio) -> list[Tensor]:
    """Returns the matrices that a decoding step reads: the layers' and lm_head's."""
    linears = [part for part in model.language_model.modules() if isinstance(part, nn.Linear)]
    return [linear.weight for linear in [*linears, model.lm_head]]


def make_limits(model: MossAudio, folder: Path) -> dict[str, tuple[float, Callable]]:
    """Returns the FLOPs or bytes, and the work, of what can't go faster on this machine."""
    weights = step_weights(model)
    on_cpu = weights[0].device.type == "cpu"
    n = 8192
    if on_cpu:
        # A CPU without instructions for 16-bit numbers takes a minute for 2,048.
        n = 2048 if weights[0].dtype == torch.float32 else 512
    matrix = weights[0].new_empty(n, n).normal_()
    wide = np.random.default_rng(0).normal(size=(1024, 1024))
    limits = {
        "plain read": (size_of(folder), lambda: read_files(folder)),
        "float64 product": (2 * 1024**3, lambda: wide @ wide),
        "matrix product": (2 * n**3, lambda: matrix @ matrix),
    }
    if on_cpu:
        size = sum(weight.nbytes for weight in weights)
        # 16-bit numbers are summed in pairs, as float32: nothing is converted.
        words = [weight.view(-1).view(torch.float32) for weight in weights]
        limits["plain sum"] = (size, lambda: [word.sum() for word in words])
    else:
        source = torch.ones(1 << 30, dtype=torch.uint8, device=matrix.device)
        target = torch.empty_like(source)
        # Each byte is read and written, ten times.
        size = 20 * source.nbytes
        limits["copy"] = (size, lambda: [target.copy_(source) for _ in range(10)])
    return limits


def flops_of(work: Callable) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def cache_bytes(model: MossAudio, tokens: float) -> float:
    """Returns the bytes of so many tokens' keys and values."""
    c = model.config.decoder
    numbers = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim
    return tokens * numbers * model.lm_head.weight.itemsize


def count_costs(model: MossAudio, works: dict, folder: Path, prompt: Prompt, args) -> dict:
    """Returns for each stage its limit, its cost in the limit's FLOPs or bytes, how much is done,
    and the unit of how much a second."""
    tokens = len(prompt.ids)
    heard = int((prompt.ids == model.config.adapter.audio_token_id).sum())
    size = size_of(folder)
    # A frame of log-mel takes an FFT and the mel bands.
    frame = 2.5 * N_FFT * np.log2(N_FFT) + 2 * N_MELS * (N_FFT // 2 + 1)
    mel = frame * args.seconds * SAMPLE_RATE / HOP
    encoding = flops_of(works["encoding"])
    prefill = flops_of(works["prefill"])
    costs = {
        "loading": ("plain read", size, size / 1e9, "GB/s"),
        "log_mel": ("float64 product", mel, args.seconds, "s of sound/s"),
        "encoding": ("matrix product", encoding, heard, "audio tokens/s"),
        "prefill": ("matrix product", prefill, tokens, "tokens/s"),
    }
    weights = sum(weight.nbytes for weight in step_weights(model))
    memory = "plain sum" if model.lm_head.weight.device.type == "cpu" else "copy"
    for name, rows in (("decoding", 1), ("batch", args.batch)):
        count = count_steps(rows, args)
        # The cache as it is halfway.
        step = weights + rows * cache_bytes(model, tokens + count / 2)
        costs[name] = (memory, count * step, count * rows, "tokens/s")
    return costs


# ---- measuring ----


def seconds_of(work: Callable, device: torch.device) -> float:
    start = time.perf_counter()
    result = work()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    seconds = time.perf_counter() - start
    del result  # freeing it is no part of the work
    return seconds


def peak_bytes(device: torch.device) -> int:
    """Returns the most memory held since measure began: by CUDA's tensors, else by the process
    (Linux; or 0)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+)", status.read_text()) if status.exists() else None
    return 1024 * int(found[1]) if found else 0


def make_prompt(model: MossAudio, wave: Tensor, args: argparse.Namespace) -> Prompt:
    prompt = model.prompt(TEXT, [wave])
    free = model.config.decoder.max_position_embeddings - len(prompt.ids)
    given = f"--new-tokens is {args.new_tokens}"
    require(args.new_tokens <= free, f"{given}; expected at most {free} after this prompt")
    return prompt


def measure_stages(model: MossAudio, folder: Path, args: argparse.Namespace) -> dict:
    device = model.lm_head.weight.device
    wave = sound(args.seconds)
    prompt = make_prompt(model, wave, args)
    N = len(prompt.ids)
    ours = our_stages(model, wave, prompt)
    costs = count_costs(model, ours, folder, prompt, args)
    ours["decoding"] = our_steps(model, N, 1, args)
    ours["decoding"]()
    found = {"tokens": N, "peak_bytes": peak_bytes(device), "stages": {}}
    ours["batch"] = our_steps(model, N, args.batch, args)
    ours["loading"] = lambda: MossAudio.from_pretrained(folder, args.device, args.dtype)
    limits = make_limits(model, folder)
    peers = peer_stages(model, folder, wave, prompt, args) if args.peer else {}
    for name, (limit, cost, amount, unit) in costs.items():
        limit_cost, limit_work = limits[limit]
        works = [limit_work, ours[name]]
        if name in peers:
            works.append(peers[name])
        times = []
        # In turns, so that a busy moment meets all of them; number 0 is the warm-up.
        for turn in range(args.repeats + 1):
            say(f"{name}: {turn} of {args.repeats}")
            times.append([seconds_of(work, device) for work in works])
        limit_seconds, seconds, *peer_seconds = np.median(times[1:], axis=0).tolist()
        rate = limit_cost / limit_seconds
        stage = {"seconds": seconds, "rate": amount / seconds, "unit": unit}
        stage |= {"share_of_limit": cost / seconds / rate, "limit": limit, "limit_rate": rate}
        if name in peers:
            stage["ratio_to_peer"] = seconds / peer_seconds[0]
        found["stages"][name] = stage
    if args.peer:
        # transformers loads the decoder alone.
        decoder = [*model.language_model.parameters(), model.lm_head.weight]
        share = sum(w.numel() for w in decoder) / sum(w.numel() for w in model.parameters())
        found["stages"]["loading"]["ratio_to_peer"] *= share
    one_row = found["stages"]["decoding"]["rate"]
    batch = found["stages"]["batch"]
    batch["times_one_row"] = args.batch * one_row / batch["rate"]
    return found


def measure_lengths(model: MossAudio, args: argparse.Namespace) -> list[dict]:
    device = model.lm_head.weight.device
    weights = sum(weight.nbytes for weight in model.parameters())
    rows = []
    for length in args.lengths or LENGTHS:
        say(f"{length:g} s of sound")
        wave = sound(length)
        prompt = make_prompt(model, wave, args)
        row = {"length": length, "tokens": len(prompt.ids)}
        for _ in range(2 if length <= 120 else 1):
            for name, work in our_stages(model, wave, prompt).items():
                row[name] = seconds_of(work, device)
        steps = our_steps(model, len(prompt.ids), 1, args)
        row["step"] = seconds_of(steps, device) / count_steps(1, args)
        row["peak_bytes"] = peak_bytes(device)
        tokens = len(prompt.ids) + args.new_tokens - 1
        row["weights_and_cache"] = weights + cache_bytes(model, tokens)
        rows.append(row)
    return rows


def measure(args: argparse.Namespace, temp: Path) -> dict:
    """Returns what --json prints."""
    device = pick_device(args.device)
    folder = Path(args.model)
    if args.shape:
        say(f"making random weights, {args.shape}")
        source = write_config(args.shape, temp / "config")
        folder = temp / "checkpoint"
        torch.set_default_dtype(torch.bfloat16)  # in float32 they would take twice the memory
        try:
            with device:
                model = random_model(source, 0)
        finally:
            torch.set_default_dtype(torch.float32)
        save_checkpoint(model, folder, source)
        del model
    # The peak falls to what is held now: making random weights is not measured.
    mark = Path("/proc/self/clear_refs")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif mark.exists():
        mark.write_text("5")
    model = MossAudio.from_pretrained(folder, args.device, args.dtype)
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    if args.peer:
        versions["transformers"] = PEER
    found = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "dtype": str(model.lm_head.weight.dtype).removeprefix("torch."),
        "shape": args.shape or folder.resolve().name,
        "versions": versions,
        "threads": torch.get_num_threads(),
    }
    if args.lengths is None:
        return found | measure_stages(model, folder, args)
    return found | {"lengths": measure_lengths(model, args)}


# ---- command line ----


def markdown(rows: list[dict]) -> str:
    lines = [list(rows[0]), ["---", *["---:"] * (len(rows[0]) - 1)]]
    lines += [[str(value) for value in row.values()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def report(found: dict) -> str:
    """Returns a table in Markdown, under a line on what ran where and when."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    where = f"{found['shape']}, {found['dtype']}, {found['device']}, {found['threads']} threads"
    title = f"{where}, {versions}, {datetime.date.today()}"
    rows = []
    for one in found.get("lengths", []):
        row = {"clip": f"{one['length']:g} s", "prompt": f"{one['tokens']} tokens"}
        row |= {name: f"{one[name]:.3g} s" for name in ("log_mel", "encoding", "prefill", "step")}
        row["peak memory"] = f"{one['peak_bytes'] / 1e9:.3g} GB"
        row["weights and cache"] = f"{one['weights_and_cache'] / 1e9:.3g} GB"
        rows.append(row)
    if rows:
        return f"{title}\n\n{markdown(rows)}"
    for name, stage in found["stages"].items():
        row = {"stage": name, "time": f"{stage['seconds']:.4g} s"}
        row["rate"] = f"{stage['rate']:.4g} {stage['unit']}"
        unit = "FLOP" if stage["limit"].endswith("product") else "B"
        limit = f"{stage['limit']}, {stage['limit_rate'] / 1e9:.4g} G{unit}/s"
        row["share of limit"] = f"{stage['share_of_limit']:.1%} of a {limit}"
        if "ratio_to_peer" in stage:
            row["time over transformers'"] = f"{stage['ratio_to_peer']:.2f}"
        rows.append(row)
    peak = f"{found['tokens']} prompt tokens. Peak memory: {found['peak_bytes'] / 1e9:.2f} GB."
    times = found["stages"]["batch"]["times_one_row"]
    batch = f"A step of the batch takes {times:.2f} times as long as a step of one row."
    return f"{title}\n\n{markdown(rows)}\n\n{peak} {batch}"


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for an option out of range."""
    for seconds in (args.seconds, *(args.lengths or ())):
        good = 0.01 <= seconds <= 86_400
        require(good, f"a clip of {seconds:g} s; expected 0.01 (one frame) to 86400 (a day)")
    for name, least in {"new_tokens": 2, "repeats": 1, "threads": 1, "batch": 1}.items():
        given = getattr(args, name)
        option = name.replace("_", "-")
        good = given is None or given >= least
        require(good, f"--{option} is {given}; expected at least {least}")
    require(not (args.peer and args.lengths is not None), "expected --peer or --lengths, not both")
    require(not args.shape or args.model == TINY, "expected --model or --shape, not both")
    if args.peer:
        try:
            version = importlib.metadata.version("transformers")
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        install = f"pip install transformers=={PEER}"
        require(version == PEER, f"--peer: transformers is {version}; expected {PEER} ({install})")


@torch.no_grad()
def run(args: argparse.Namespace) -> None:
    check(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(prefix="moss-bench-") as temp:
        found = measure(args, Path(temp))
    print(json.dumps(found) if args.json else report(found), flush=True)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = moss_min.Parser("bench.py", __doc__)
    add = parser.add_argument
    moss_min.add_model_options(parser)
    add("--shape", choices=SHAPES, help="random weights of these dimensions")
    add("--seconds", type=float, default=30, metavar="X", help="length of the clip (%(default)s)")
    add("--new-tokens", type=int, default=128, metavar="N", help="of the answer (%(default)s)")
    add("--repeats", type=int, default=6, metavar="N", help="timed runs (%(default)s)")
    add("--batch", type=int, default=8, metavar="N", help="rows that step together (%(default)s)")
    add("--threads", type=int, metavar="N", help="torch's; OMP_NUM_THREADS sets numpy's, too")
    graph = "on CUDA, launch each step's kernels anew"
    add("--no-cuda-graph", dest="cuda_graph", action="store_false", help=graph)
    add("--peer", action="store_true", help=f"compare with transformers {PEER}")
    lengths = f"clips of these seconds instead ({' '.join(map(str, LENGTHS))})"
    add("--lengths", type=float, nargs="*", metavar="X", help=lengths)
    add("--json", action="store_true", help="print one JSON object, not a table")
    return moss_min.end("bench", lambda: run(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
