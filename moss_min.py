"""MOSS-Audio, minimal and exact: configuration, tokenizer, loading, prompt, model, command line.
Shapes: T mel frames, A audio tokens, N prompt tokens, n tokens of a call, B batch, D the decoder's
width, E the encoder's output_dim, V vocabulary."""

import os
import signal
import sys

if sys.version_info < (3, 10):  # noqa: UP036
    sys.exit("moss_min: expected Python 3.10 or newer")
if __name__ == "__main__":
    # Ctrl-C is quiet during the imports, too, which take seconds.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
import contextlib
import difflib
import functools
import json
import re
import time
import warnings
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor, nn

from adapter import DIGIT_IDS, AdapterConfig, GatedMLP, audio_ids, splice
from encoder import HOP, AudioEncoder, EncoderConfig, count_tokens, load_audio, log_mel, require
from qwen3 import KVCache, Linear, Qwen3, Qwen3Config
from sample import Picker, Sampling, generate, split_thinking, stream_answer, stream_text

__all__ = ["MossAudio", "Prompt", "load_audio", "log_mel", "split_thinking", "stream_text"]

# ---- configuration ----

MossConfig = namedtuple("MossConfig", "encoder adapter decoder stop_ids")

KINDS = {int: "a whole number from 1 to 2^20", float: "a number above 0", bool: "true or false"}
KINDS |= {tuple[int, ...]: "numbers from 0 up", dict: "an object"}


def checked(value, kind: type, name: str):
    """Returns a JSON value if it is of that kind, a list as a tuple."""
    good = type(value) is kind
    if kind is int:
        good = good and 0 < value <= 2**20
    elif kind is float:
        good = type(value) in (int, float) and 0 < value < 2**31
    elif kind == tuple[int, ...]:
        good = type(value) is list and all(type(i) is int and i >= 0 for i in value)
    given = "missing" if value is None else f"{value!r:.60}"
    require(good, f"{name} is {given}; expected {KINDS[kind]}")
    return tuple(value) if type(value) is list else value


def read_json(path: Path, optional: bool = False) -> dict:
    """Returns the object in a JSON file; an empty one for an optional file that is not there."""
    try:
        data = {} if optional and not path.exists() else json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} can't be read as a checkpoint folder's JSON: {error}") from error
    return checked(data, dict, path.name)


def read_fields(config_class: type, data: dict, where: str):
    """Makes a config dataclass of the values under its fields' names, which may have defaults."""
    values = {}
    for field in fields(config_class):
        if field.name in data or field.default is MISSING:
            values[field.name] = checked(data.get(field.name), field.type, where + field.name)
    return config_class(**values)


def expect(data: dict, where: str, **values) -> None:
    """Refuses other values than these, which would change the arithmetic. All may be absent."""
    for key, value in values.items():
        given = data.get(key, value)
        require(given == value, f"{where}: {key} is {given!r:.60}; only {value!r} is supported")


def read_config(folder: Path) -> MossConfig:
    """Reads a checkpoint folder's configuration. Raises ValueError for what isn't supported."""
    odd = [path.name for path in folder.glob("*") if path.is_fifo() or path.is_char_device()]
    require(not odd, f"{folder}: {odd} are pipes or devices; expected files")
    config = {"model_type": None} | read_json(folder / "config.json")
    processor = read_json(folder / "processor_config.json", optional=True)
    generation = read_json(folder / "generation_config.json", optional=True)
    audio = checked(config.get("audio_config"), dict, "audio_config")
    language = checked(config.get("language_config"), dict, "language_config")
    mel = checked(processor.get("mel_config", {}), dict, "mel_config")
    expect(config, "config.json", model_type="moss_audio", tie_word_embeddings=False)
    expect(audio, "audio_config", num_mel_bins=128, activation_function="gelu", downsample_rate=8)
    expect(language, "language_config", hidden_act="silu", attention_bias=False, rope_scaling=None)
    expect(language, "language_config", rope_parameters=None, use_sliding_window=False)
    expect(language, "language_config", tie_word_embeddings=False)
    expect(mel, "mel_config", mel_sr=16_000, mel_dim=128, mel_n_fft=400, mel_hop_length=160)
    expect(mel, "mel_config", mel_dtype="bfloat16", use_whisper_feature_extractor=True)
    layers = language.get("layer_types") or []
    full = type(layers) is list and all(kind == "full_attention" for kind in layers)
    require(full, "language_config: layer_types: only full_attention is supported")

    encoder = read_fields(EncoderConfig, audio, "config.json: audio_config.")
    decoder = read_fields(Qwen3Config, language, "config.json: language_config.")
    sizes = {"output_dim": encoder.output_dim, "hidden_size": decoder.hidden_size}
    name = "adapter_hidden_size"
    sizes[name] = checked(config.get(name), int, f"config.json: {name}")
    adapter = read_fields(AdapterConfig, processor | sizes, "processor_config.json: ")
    taps = encoder.deepstack_encoder_layer_indexes
    name = "deepstack_num_inject_layers"
    counts = checked([config.get(name, len(taps))], tuple[int, ...], name)  # in a list: 0 is one
    eos = generation.get("eos_token_id", language.get("eos_token_id"))
    stop_ids = checked([eos] if type(eos) is int else eos, tuple[int, ...], "eos_token_id")

    D = encoder.d_model
    heads = encoder.encoder_attention_heads
    even = D > 2 and D % 2 == 0 and D % heads == 0
    require(even, f"d_model is {D}; expected an even multiple of the {heads} heads")
    require(decoder.head_dim % 2 == 0, f"head_dim is {decoder.head_dim}; expected an even number")
    shared = decoder.num_attention_heads % decoder.num_key_value_heads == 0
    require(shared, "expected num_key_value_heads to divide num_attention_heads")
    exist = max(taps, default=0) < encoder.encoder_layers
    require(exist, f"deepstack_encoder_layer_indexes {taps}: expected layers that there are")
    layers = max(encoder.encoder_layers, decoder.num_hidden_layers, len(taps))
    require(layers <= 512, f"config.json has {layers} layers or taps; expected at most 512")
    ids = (adapter.audio_token_id, adapter.audio_start_id, adapter.audio_end_id)
    known = f"audio_token_id, audio_start_id and audio_end_id are {ids}, eos_token_id {stop_ids}"
    apart = len({*ids, *DIGIT_IDS}) == len(ids) + len(DIGIT_IDS)
    good = apart and max(*ids, *stop_ids) < decoder.vocab_size
    require(good, f"{known}; expected below vocab_size, audio ids of their own and no digit's")
    encoder = replace(encoder, deepstack_encoder_layer_indexes=taps[: counts[0]])
    return MossConfig(encoder, adapter, decoder, stop_ids)


# ---- tokenizer and weights ----

# Qwen's pieces, across which BPE merges nothing: words, digits, punctuation, line ends, spaces.
PIECE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def load_tokenizer(folder: Path) -> Tokenizer:
    """Loads Qwen's byte-level BPE: a tokenizer.json, or its vocabulary, merges and added tokens."""
    try:
        if (folder / "tokenizer.json").exists():
            # The vocabulary alone is taken: tokenizers may panic at what else is in a bad file.
            data = read_json(folder / "tokenizer.json")
            expect(data, "tokenizer.json", normalizer={"type": "NFC"})
            bpe = data["model"]
            affixes = bpe.get("continuing_subword_prefix") or bpe.get("end_of_word_suffix")
            require(not affixes, f"model: a prefix or suffix of pieces, {affixes!r:.60}")
            expect(bpe, "model", type="BPE", dropout=None, ignore_merges=False)
            pattern = data["pre_tokenizer"]["pretokenizers"][0]["pattern"]
            expect(pattern, "pre_tokenizer", Regex=PIECE)
            vocab = bpe["vocab"]
            merges = [tuple(m.split(" ") if type(m) is str else m) for m in bpe["merges"]]
            added = {token.pop("id"): token for token in data["added_tokens"]}
        else:
            files = (str(folder / "vocab.json"), str(folder / "merges.txt"))
            vocab, merges = models.BPE.read_file(*files)
            added = read_json(folder / "tokenizer_config.json")["added_tokens_decoder"]
        for i, token in added.items():
            vocab[token["content"]] = int(i)  # or it would get the next free id
        tokenizer = Tokenizer(models.BPE(vocab, merges or None))  # BPE takes no empty list
        tokenizer.add_tokens([AddedToken(**token) for token in added.values()])
    except Exception as error:  # tokenizers raises no narrower class
        files = "tokenizer.json or vocab.json, merges.txt, tokenizer_config.json"
        raise ValueError(f"{folder}: {files}: {error!r:.200}") from error
    split = pre_tokenizers.Split(Regex(PIECE), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def map_shards(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Returns file name -> tensors of a checkpoint's safetensors. They are mapped: what is in them
    is read from the disk when it is used."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists():
        weight_map = checked(read_json(index).get("weight_map"), dict, "weight_map")
        names = sorted({str(name) for name in weight_map.values()})
    shards = {}
    for name in names:
        inside = Path(name).name == name
        require(inside, f"{index} names {name!r:.60}; expected a file in the same folder")
        path = folder / name
        try:
            with safe_open(path, "pt") as file:
                shards[name] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            pointer = path.is_file() and path.open("rb").read(8) == b"version "
            said = "a Git-LFS pointer, not the file itself (git lfs pull)" if pointer else error
            raise ValueError(f"{path}: {said}; expected a whole safetensors file") from error
        # Some re-exports have a table that is derived, not learned.
        shards[name].pop("audio_encoder.embed_positions.inv_timescales", None)
        for key, tensor in shards[name].items():
            good = tensor.dtype in DTYPES.values()
            require(good, f"{path}: {key} is {tensor.dtype}; expected {', '.join(DTYPES)}")
    return shards


def pick_device(name: str) -> torch.device:
    """Returns the device of that name; auto is CUDA, else MPS, else the CPU."""
    try:
        if name == "auto":
            available = torch.accelerator.is_available()
            return torch.accelerator.current_accelerator() if available else torch.device("cpu")
        torch.ones(1, device=name).item()
        return torch.device(name)
    except (RuntimeError, AssertionError, ImportError) as error:
        said = f"({error!s:.200}); expected auto, cuda, mps or cpu"
        raise ValueError(f"device {name!r} can't be used {said}") from error


# ---- prompt and model ----

CLIP = "<|audio_bos|><|AUDIO|><|audio_eos|>"  # a clip's placeholder
PLACEHOLDER = re.compile(r"<\|audio_bos\|>(?:<\|AUDIO\|>)+<\|audio_eos\|>")
PIECE_OF_ONE = re.compile(r"<\|(?:audio_bos|AUDIO|audio_eos)\|>")
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
USER = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
SLICE = 512  # prompt tokens in the decoder at a time: little memory, however long the sound

Prompt = namedtuple("Prompt", "ids mels")  # int64 [N]; for each clip, bfloat16 [128, T]


class MossAudio(nn.Module):
    """The whole model. Submodules have the checkpoint's names."""

    def __init__(self, config: MossConfig, tokenizer: Tokenizer):
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.audio_encoder = AudioEncoder(config.encoder)
        self.audio_adapter = GatedMLP(config.adapter)
        mergers = [GatedMLP(config.adapter) for _ in config.encoder.deepstack_encoder_layer_indexes]
        self.deepstack_audio_merger_list = nn.ModuleList(mergers)
        self.language_model = Qwen3(config.decoder)
        self.lm_head = Linear(config.decoder.hidden_size, config.decoder.vocab_size)

    @classmethod
    def from_pretrained(cls, folder, device="auto", dtype="auto", report=None, change=None):
        """Loads a checkpoint folder for inference: no parameter requires a gradient. dtype auto is
        float32 on a CPU, elsewhere the stored lm_head's. report is called with a line for each
        file. change takes a tensor's name and the tensor as it is stored to the one to be loaded in
        its place. Raises ValueError."""
        folder = Path(folder)
        download = f"download it first: hf download {folder} --local-dir {folder.name}"
        hint = download if len(folder.parts) == 2 else "expected a checkpoint's"
        require(folder.is_dir(), f"{folder} is no folder; {hint}")
        device = pick_device(device)
        dtype = str(dtype).removeprefix("torch.")
        kinds = ["auto", *DTYPES]
        require(dtype in kinds, f"dtype is {dtype!r}; expected {', '.join(kinds)}")
        config = read_config(folder)
        shards = map_shards(folder)
        tokenizer = load_tokenizer(folder)
        vocab = tokenizer.get_vocab()
        lacking = {"<|im_end|>", *pre_tokenizers.ByteLevel.alphabet()} - vocab.keys()
        require(not lacking, f"{folder}: the tokenizer lacks {sorted(lacking)[:3]}")
        largest = max(vocab.values())
        V = config.decoder.vocab_size
        require(largest < V, f"{folder}: the tokenizer has id {largest}; expected below {V}")
        with torch.device("meta"):  # shapes without memory
            model = cls(config, tokenizer).requires_grad_(False).eval()
        weights = {key: tensor for shard in shards.values() for key, tensor in shard.items()}
        try:  # before anything is read: says what is missing, unexpected or misshaped
            model.load_state_dict(weights, assign=True)
        except RuntimeError as error:
            said = " ".join(str(error).split())
            raise ValueError(f"{folder}: the tensors don't fit config.json: {said:.250}") from error
        kind = DTYPES.get(dtype, weights["lm_head.weight"].dtype)
        if dtype == "auto" and device.type == "cpu":
            kind = torch.float32
        mkldnn = torch.backends.mkldnn.is_available()
        fast = mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        if report and device.type == "cpu" and kind == torch.bfloat16 and not fast:
            report("this CPU has no bfloat16 instructions: float32 is many times faster")
        if device.type == "cuda" and kind == torch.float32:
            # TF32 keeps ten bits of a factor: that is not float32.
            torch.backends.cuda.matmul.allow_tf32 = False
            torch.backends.cudnn.allow_tf32 = False
        for number, (name, shard) in enumerate(shards.items(), 1):
            if report:
                report(f"loading {name} ({number} of {len(shards)})")
            for key, tensor in shard.items():
                tensor = change(key, tensor) if change else tensor
                weights[key] = tensor.to(device, kind)
        model.load_state_dict(weights, assign=True)
        return model

    def prompt_ids(self, text: str, frames=(), time_markers: bool | None = None) -> list[int]:
        """Returns a prompt's ids, of a text and its clips' numbers of mel frames; see prompt."""
        config = self.config.adapter
        n_window = self.config.encoder.n_window
        most = self.config.decoder.max_position_embeddings
        is_text = re.search("[\ud800-\udfff]", text) is None
        require(is_text, "the prompt has bytes that are not UTF-8; expected text")
        short = len(text.encode()) <= 128 * min(most, 40_960)  # Qwen's longest token has 128
        require(short, f"the prompt has {len(text)} characters; expected at most {most} tokens")
        if not PLACEHOLDER.search(text):
            clips = CLIP * len(frames) + "\n" if frames else ""
            text = SYSTEM + USER.format(clips + text)
        stretches = PLACEHOLDER.split(text)
        slots = len(stretches) - 1
        given = len(frames)
        require(slots == given, f"the prompt has {slots} audio placeholders; expected {given}")
        if time_markers is None:
            time_markers = config.enable_time_marker
        sounds = [audio_ids(count_tokens(n, n_window), config, time_markers) for n in frames]
        ids = []
        for stretch, sound in zip(stretches, [*sounds, []]):
            # Each stretch of text is tokenized on its own, or BPE would merge across a clip.
            words = self.tokenizer.encode(stretch, add_special_tokens=False).ids
            stray = PIECE_OF_ONE.search(stretch) or config.audio_token_id in words
            message = "the prompt's text has a token that stands for sound; expected whole"
            require(not stray, f"{message} placeholders, {CLIP}")
            ids += words + sound
        count = len(ids)
        require(count <= most, f"the prompt has {count} tokens; expected at most {most} positions")
        return ids

    def prompt(self, text: str, clips=(), time_markers: bool | None = None) -> Prompt:
        """Makes the model's input of a text and its clips: what load_audio takes, or a list of it.
        A text without placeholders (<|audio_bos|><|AUDIO|><|audio_eos|>, one a clip) is wrapped as
        a user's, behind the clips. time_markers: None is as processor_config.json says. Raises
        ValueError for bad sound, placeholders that don't match the clips, and too many tokens.
        Special tokens in the text, such as <|im_end|>, become their ids, as upstream's do: an
        application must decide about text from strangers."""
        if not isinstance(clips, (list, tuple)):
            clips = [clips]
        waves = [load_audio(clip) for clip in clips]
        ids = self.prompt_ids(text, [len(wave) // HOP for wave in waves], time_markers)
        return Prompt(torch.tensor(ids), [log_mel(wave) for wave in waves])

    def hear(self, mels: list[Tensor], report=None) -> list[Tensor]:
        """Returns the encoder's rows for all clips' tokens: its output, its taps, [A, E] each."""
        return self.audio_encoder(mels, report) if mels else []

    def decode(self, ids: Tensor, positions: Tensor, cache: KVCache, in_use: int, sound=()):
        """Takes ids [B, n] and hear's rows for the audio tokens in them to hidden states [B, n, D].
        positions and in_use: see KVCache.place."""
        x = self.language_model.embed_tokens(ids)  # [B, n, D]
        deepstack = []
        if sound:
            is_audio = ids == self.config.adapter.audio_token_id
            output, *taps = sound
            x = splice(x, self.audio_adapter(output), is_audio)
            for merger, tap in zip(self.deepstack_audio_merger_list, taps):
                deepstack.append(splice(torch.zeros_like(x), merger(tap), is_audio))
        return self.language_model(x, positions, cache, in_use, deepstack)

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        return KVCache(self.config.decoder, batch, capacity, self.lm_head.weight)

    def forward(self, prompt: Prompt) -> Tensor:
        """Returns the logits of every position, float32 [N, V]."""
        N = len(prompt.ids)
        ids = prompt.ids[None].to(self.lm_head.weight.device)
        positions = torch.arange(N, device=ids.device)[None]
        x = self.decode(ids, positions, self.new_cache(1, N), N, self.hear(prompt.mels))
        return self.lm_head(x)[0].float()

    def prefill(self, prompt: Prompt, cache: KVCache, report=None) -> Tensor:
        """Puts a prompt into an empty cache of one row, slice by slice. Returns the logits of its
        last position, float32 [1, V]."""
        N = len(prompt.ids)
        sound = self.hear(prompt.mels, report)
        heard = 0
        for start in range(0, N, SLICE):
            ids = prompt.ids[None, start : start + SLICE].to(self.lm_head.weight.device)
            count = int((ids == self.config.adapter.audio_token_id).sum())
            rows = [part[heard : heard + count] for part in sound]
            heard += count
            end = start + ids.shape[1]
            positions = torch.arange(start, end, device=ids.device)[None]
            x = self.decode(ids, positions, cache, end, rows)
            if report and N > SLICE:
                report(f"prompt: {end} of {N} tokens")
        return self.lm_head(x[:, -1]).float()

    def step(self, ids: Tensor, positions: Tensor, cache: KVCache, in_use: int) -> Tensor:
        """Takes each row's next id, int64 [B, 1], to the logits after it, float32 [B, V]."""
        return self.lm_head(self.decode(ids, positions, cache, in_use)[:, -1]).float()

    def fit(self, prompt: Prompt, sampling: Sampling) -> Sampling:
        """Bounds max_new_tokens by the positions that the prompt leaves free, and by 4,096 if it is
        None. Raises ValueError if no position is free."""
        used = len(prompt.ids)
        most = self.config.decoder.max_position_embeddings
        require(used < most, f"the prompt has {used} tokens; expected fewer than {most} positions")
        wanted = 4096 if sampling.max_new_tokens is None else sampling.max_new_tokens
        return replace(sampling, max_new_tokens=min(wanted, most - used))

    def is_cut(self, ids: list[int]) -> bool:
        """Tells whether an answer ended because it had no more room, and not by itself."""
        return ids[-1] not in self.config.stop_ids

    def generate(
        self,
        prompt: Prompt,
        max_new_tokens=None,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        seed=None,
        thinking_budget=None,
        cuda_graph=True,
        report=None,
    ) -> Iterator[int]:
        """Yields the answer's ids, up to and with the first stop id; the options are Sampling's.
        cuda_graph: on CUDA, capture a step once and replay it. report is called with lines on how a
        long prompt goes. Raises ValueError, at the call, for options out of range (and see fit)."""
        sampling = Sampling(max_new_tokens, temperature, top_p, top_k, seed, thinking_budget)
        sampling = self.fit(prompt, sampling)
        N = len(prompt.ids)
        cache = self.new_cache(1, N + min(sampling.max_new_tokens, 1024))  # it grows if need be
        prefill = functools.partial(self.prefill, prompt, cache, report)
        step = Step(self, cache, [N], cuda_graph)
        picker = Picker(sampling, self.tokenizer, prompt.ids.tolist(), self.lm_head.weight.device)
        return generate(prefill, step, picker, self.config.stop_ids)

    def ask(
        self,
        clips,
        text: str,
        time_markers=None,
        max_new_tokens=None,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        seed=None,
        thinking_budget=None,
    ) -> str:
        """Returns the answer to a text about a clip or a list of clips; see prompt and generate.
        Warns of an answer that is cut."""
        prompt = self.prompt(text, clips, time_markers)
        draw = (temperature, top_p, top_k, seed)
        ids = list(self.generate(prompt, max_new_tokens, *draw, thinking_budget))
        if self.is_cut(ids):
            warnings.warn(f"the answer is cut after {len(ids)} tokens", stacklevel=2)
        return self.tokenizer.decode(ids)


class StepGraph:
    """A step captured as a CUDA graph: one launch in place of hundreds. It repeats the same work on
    the same memory: ids and positions are tensors that stay, to be written into, and attention goes
    over the whole cache."""

    stream = functools.cache(torch.cuda.Stream)  # one for a device: each keeps a workspace

    def __init__(self, model: MossAudio, ids: Tensor, positions: Tensor, cache: KVCache):
        with torch.cuda.device(ids.device):
            # Libraries make their plans in a first run.
            model.step(ids, positions, cache, cache.capacity)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=StepGraph.stream(ids.device)):
                self.logits = model.step(ids, positions, cache, cache.capacity)

    def __call__(self) -> Tensor:
        """Returns the logits, float32 [B, V], in memory that the next call overwrites."""
        self.graph.replay()
        return self.logits


class Step:
    """Steps of a cache's rows, from their positions on; on CUDA by a graph, unless told not to."""

    def __init__(self, model: MossAudio, cache: KVCache, positions: list[int], cuda_graph=True):
        self.model = model
        self.cache = cache
        self.in_use = max(positions)
        self.positions = torch.tensor(positions, device=cache.keys[0].device)[:, None]  # [B, 1]
        self.ids = torch.zeros_like(self.positions)
        self.use_graph = cuda_graph and self.ids.device.type == "cuda"
        self.graph = None

    def __call__(self, *tokens: int) -> Tensor:
        """Takes an id of each row to the logits after it, float32 [B, V], until the next call."""
        self.ids.copy_(torch.tensor(tokens)[:, None])
        self.in_use += 1
        if self.in_use > self.cache.capacity:
            self.cache.grow()
            self.graph = None
        if self.use_graph and self.graph is None:
            self.graph = StepGraph(self.model, self.ids, self.positions, self.cache)
        if self.use_graph:
            logits = self.graph()
        else:
            logits = self.model.step(self.ids, self.positions, self.cache, self.in_use)
        self.positions += 1
        return logits


# ---- command line ----

TINY = Path(__file__).resolve().parent / "tiny"  # the small checkpoint
SAMPLE = TINY / "bell.wav"


class Parser(argparse.ArgumentParser):
    """An argument parser whose help begins with its description, and whose errors are one line."""

    def __init__(self, prog: str, description: str | None = None):
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, argparse.SUPPRESS, description, formatter_class=layout)
        self.allow_abbrev = False

    def error(self, message: str):
        unknown = re.match(r"unrecognized arguments: (\S+)", message)
        mistyped = unknown[1] if unknown else ""
        near = difflib.get_close_matches(mistyped, self._option_string_actions, 1)
        nearest = f" (the nearest option is {near[0]})" if near else ""
        raise ValueError(f"{message}{nearest}; see --help")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", default=TINY, metavar="FOLDER", help="checkpoint folder (the one in tiny/)")
    add("--device", default="auto", metavar="D", help="cuda, mps, cpu or auto (the first there is)")
    add("--dtype", default="auto", metavar="T", help="float32, bfloat16, float16 or auto")


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--max-new-tokens", type=int, metavar="N", help="the most (4096, if there is room)")
    heat = parser.add_mutually_exclusive_group().add_argument
    heat("--temperature", type=float, metavar="X", help="below 1.0: likelier tokens (1.0)")
    heat("--greedy", dest="temperature", action="store_const", const=0, help="the likeliest token")
    add("--top-p", type=float, default=1.0, metavar="X", help="of the likeliest, X together")
    add("--top-k", type=int, default=50, metavar="N", help="of the N likeliest (50; 0: all)")
    add("--seed", type=int, metavar="N", help="draw the same answer each time")
    add("--thinking-budget", type=int, metavar="N", help="end a thought after N tokens")
    add("--no-time-markers", dest="time_markers", action="store_const", const=False)
    add("--no-cuda-graph", dest="cuda_graph", action="store_false", help="on CUDA: plain steps")


def read_sampling(args: argparse.Namespace) -> Sampling:
    """Returns what the options say of sampling. Raises ValueError for one out of range."""
    options = {field.name: getattr(args, field.name) for field in fields(Sampling)}
    if args.temperature is None:
        options["temperature"] = 1.0
    return Sampling(**options)


def peak_bytes(device: torch.device) -> int:
    """Returns the most memory held so far: on CUDA by tensors, else by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0  # it can't say
    import resource  # which Windows lacks

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def out_of_memory(error: BaseException) -> bool:
    """Tells whether memory ran out: torch's CPU allocator raises a mere RuntimeError."""
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(error)


def say(line: str) -> None:
    """Prints a line on stderr, control characters escaped, whether or not somebody reads it."""
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    with contextlib.suppress(OSError):
        print(shown, file=sys.stderr, flush=True)


def end(program: str, work: Callable[[], int | None]) -> int:
    """Runs a program's work and returns its exit status: 2, after one line on stderr, for what is
    wrong with the input; 130 after Ctrl-C."""
    sys.stderr = sys.stderr or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")  # it was closed
    try:
        return work() or 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader has enough. What is left goes nowhere, or Python complains at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        foreseen = (ValueError, OSError, SafetensorError)
        if not isinstance(error, foreseen) and not out_of_memory(error):
            raise
        say(f"{program}: {' '.join(str(error).split()):.380}")
        return 2


DESCRIPTION = """Answers a question about sounds, as it is generated, on stdout.

    python moss_min.py speech.wav --greedy --prompt "Transcribe the audio."
"""


def run(argv: list[str] | None) -> None:
    """Prints the answer as it is generated and, unless quiet, how it goes to stderr."""
    parser = Parser("moss_min.py", DESCRIPTION)
    add = parser.add_argument
    add("audio", nargs="*", metavar="AUDIO", help="the clips of one prompt; - is one from stdin")
    add("--prompt", metavar="TEXT", help="what to ask; with AUDIO: Describe this audio.")
    add_model_options(parser)
    add_sampling_options(parser)
    add("--hide-thinking", action="store_true", help="print the answer alone")
    add("--quiet", action="store_true", help="print nothing on stderr but what goes wrong")
    add("--lora", metavar="FOLDER", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    require(args.lora is None, "--lora: expected it merged, by tools/train.py --merge, as --model")

    def report(line: str) -> None:
        if not args.quiet:
            say(line)

    names = args.audio
    if not names and args.prompt is None:
        names = [str(SAMPLE)]
        report(f"no AUDIO and no --prompt: this is {SAMPLE}")
        if args.temperature is None and (args.top_p, args.top_k, args.seed) == (1.0, 50, None):
            args.temperature = 0  # the demonstration is the same each time
    text = "Describe this audio." if args.prompt is None else args.prompt
    sampling = read_sampling(args)  # what is wrong with them is said before anything is loaded
    waves = [load_audio(sys.stdin.buffer if name == "-" else name) for name in names]
    model = MossAudio.from_pretrained(args.model, args.device, args.dtype, report)
    times = [time.perf_counter()]
    prompt = model.prompt(text, waves, args.time_markers)
    for name, mel in zip(names, prompt.mels):
        report(f"{name}: {mel.shape[1] / 100:.2f} s")
    report(f"prompt: {len(prompt.ids)} tokens")
    ids = []
    generated = model.generate(prompt, **vars(sampling), cuda_graph=args.cuda_graph, report=report)

    def timed() -> Iterator[int]:
        for token in generated:
            times.append(time.perf_counter())
            ids.append(token)
            yield token

    pieces = stream_text(model.tokenizer, timed())
    if args.hide_thinking:
        in_thought = "<think>" in text.rpartition("</think>")[2]
        pieces = stream_answer(pieces, in_thought)
    answer = ""
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
            answer += piece
    finally:
        print(flush=True)
    if model.is_cut(ids):
        say(f"the answer is cut after {len(ids)} tokens: no room for more")
    shows = sys.stdout.encoding or "utf-8"
    if answer.encode(shows, "replace").decode(shows) != answer:
        say(f"question marks stand for what {shows} can't show; set PYTHONIOENCODING=utf-8")
    first = times[1] - times[0]
    rate = (len(ids) - 1) / max(times[-1] - times[1], 1e-9)
    report(f"{len(ids)} new tokens: the first after {first:.2f} s, then {rate:.1f} a second")
    device = model.lm_head.weight.device
    where = " on the GPU" if device.type == "cuda" else ""
    report(f"peak memory: {peak_bytes(device) / 1e9:.2f} GB{where}")


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    warnings.formatwarning = lambda message, *_: f"moss_min: {message}\n"
    return end("moss_min", lambda: run(argv))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if sys.stdout:
        sys.stdout.reconfigure(errors="replace")  # what a terminal can't show is a question mark
    if sys.stderr and "--quiet" in sys.argv:
        # Libraries write to descriptor 2 by themselves: only this program keeps where it led.
        sys.stderr = os.fdopen(os.dup(2), "w", errors="backslashreplace")
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    sys.exit(main())
