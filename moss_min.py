"""MOSS-Audio, minimal and exact: configuration, tokenizer, loading, prompt, model, command line.
Shapes: T mel frames, N prompt tokens, D the decoder's width, V vocabulary."""

import os, signal, sys

if __name__ == "__main__":  # Ctrl-C is quiet during the imports, too, which take seconds
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse, json, re, time, warnings
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import MISSING, fields, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import nn
from adapter import AdapterConfig, GatedMLP, audio_ids, deepstack_rows, splice
from encoder import (
    HOP,
    SAMPLE_RATE,
    AudioEncoder,
    EncoderConfig,
    count_tokens,
    load_audio,
    log_mel,
    require,
)
from qwen3 import Linear, Qwen3, Qwen3Config
from sample import Sampling, generate, generate_batch, split_thinking, stream_answer, stream_text

# ---- configuration ----
MossConfig = namedtuple(
    "MossConfig", "encoder adapter decoder stop_ids"
)  # three config dataclasses, and ints
KINDS = {  # a config field's type -> whether a JSON value is of it, what was expected
    int: (lambda v: type(v) is int and 0 < v <= 2**20, "a whole number from 1 to 2^20"),
    float: (lambda v: type(v) in (int, float) and 0 < v < 2**31, "a number above 0"),
    bool: (lambda v: type(v) is bool, "true or false"),
    tuple[int, ...]: (
        lambda v: type(v) is list and all(type(i) is int and i >= 0 for i in v),
        "numbers from 0 up",
    ),
    dict: (lambda v: type(v) is dict, "an object"),
}
FIXED = {  # what would change the arithmetic: refused if it is another, not ignored; all but model_type may be absent
    "": {"model_type": "moss_audio", "tie_word_embeddings": False},
    "audio_config": {"num_mel_bins": 128, "activation_function": "gelu", "downsample_rate": 8},
    "language_config": {
        "hidden_act": "silu",
        "attention_bias": False,
        "rope_scaling": None,
        "rope_parameters": None,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
    },
    "mel_config": {
        "mel_sr": 16_000,
        "mel_dim": 128,
        "mel_n_fft": 400,
        "mel_hop_length": 160,
        "mel_dtype": "bfloat16",
        "use_whisper_feature_extractor": True,
    },
}


def checked(value, kind: type, name: str):
    """A JSON value, if it is of that kind (a list as a tuple)."""
    good, expected = KINDS[kind]
    require(
        good(value),
        f"{name} is {'missing' if value is None else f'{value!r:.60}'}; expected {expected}",
    )
    return tuple(value) if type(value) is list else value


def read_json(path: Path, optional: bool = False) -> dict:
    """The object in a JSON file; an empty one for an optional file that is not there."""
    try:
        data = {} if optional and not path.exists() else json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} can't be read ({error}); expected a checkpoint folder's JSON file"
        ) from error
    return checked(data, dict, path.name)


def read_fields(config_class: type, data: dict, where: str):
    """A config dataclass from the values under its fields' names; those that have a default may be left out."""
    given = [
        field for field in fields(config_class) if field.name in data or field.default is MISSING
    ]
    return config_class(
        **{f.name: checked(data.get(f.name), f.type, where + f.name) for f in given}
    )


def require_fixed(data: dict, fixed: dict, where: str) -> None:
    """Raises ValueError if data has another value under a name than fixed has."""
    for key, value in fixed.items():
        given = data.get(key, value)
        require(given == value, f"{where}{key} is {given!r:.60}; only {value!r} is supported")


def read_config(folder: Path) -> MossConfig:
    """The configuration in a checkpoint folder. Raises ValueError for what is missing, wrong or not supported."""
    config = {"model_type": None} | read_json(folder / "config.json")
    processor = {"mel_config": {}} | read_json(folder / "processor_config.json", optional=True)
    audio, language, mel = (
        checked((processor | config).get(name), dict, name) for name in list(FIXED)[1:]
    )
    for part, (name, fixed) in zip((config, audio, language, mel), FIXED.items()):
        require_fixed(part, fixed, f"config.json: {name}{'.' if name else ''}")
    encoder = read_fields(EncoderConfig, audio, "config.json: audio_config.")
    decoder = read_fields(Qwen3Config, language, "config.json: language_config.")
    layers = language.get("layer_types") or []
    require(
        type(layers) is list and {*map(str, layers)} <= {"full_attention"},
        "layer_types: not all full_attention",
    )
    widths = {
        "adapter_hidden_size": config.get("adapter_hidden_size"),
        "hidden_size": decoder.hidden_size,
    }
    adapter = read_fields(
        AdapterConfig, processor | widths | {"output_dim": encoder.output_dim}, "config.json: "
    )
    taps, D, heads = (
        encoder.deepstack_encoder_layer_indexes,
        encoder.d_model,
        encoder.encoder_attention_heads,
    )
    name = "deepstack_num_inject_layers"  # in a list, since 0 is allowed
    used = checked([config.get(name, len(taps))], tuple[int, ...], name)
    eos = read_json(folder / "generation_config.json", optional=True).get(
        key := "eos_token_id", language.get(key)
    )
    stop_ids = checked([eos] if type(eos) is int else eos, tuple[int, ...], "eos_token_id")
    ids = (adapter.audio_token_id, adapter.audio_start_id, adapter.audio_end_id, *stop_ids)
    require(
        D > 2 and D % 2 == D % heads == 0,
        f"d_model is {D}; expected an even multiple of the {heads} heads",
    )
    require(decoder.head_dim % 2 == 0, f"head_dim is {decoder.head_dim}; expected an even number")
    require(
        decoder.num_attention_heads % decoder.num_key_value_heads == 0,
        "expected key_value_heads to divide heads",
    )
    require(
        max(taps, default=0) < encoder.encoder_layers,
        f"deepstack_encoder_layer_indexes {taps}: no such layer",
    )
    require(
        max(ids) < decoder.vocab_size,
        f"audio and eos token ids {ids}: expected below {decoder.vocab_size}",
    )
    return MossConfig(
        replace(encoder, deepstack_encoder_layer_indexes=taps[: used[0]]),
        adapter,
        decoder,
        stop_ids,
    )


# ---- tokenizer and weights ----
WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def load_tokenizer(folder: Path) -> Tokenizer:
    """Qwen's byte-level BPE (a token a digit) of tokenizer.json or vocab.json, merges.txt, tokenizer_config.json."""
    try:
        if (folder / "tokenizer.json").exists():
            return Tokenizer.from_file(str(folder / "tokenizer.json"))
        vocab, merges = models.BPE.read_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
        added = read_json(folder / "tokenizer_config.json")["added_tokens_decoder"]
        vocab |= {
            token["content"]: int(i) for i, token in added.items()
        }  # or they would get the next free ids
        tokenizer = Tokenizer(models.BPE(vocab, merges or None))  # BPE refuses None
        tokenizer.add_tokens([AddedToken(**token) for token in added.values()])
    except Exception as error:  # tokenizers raises no narrower class
        raise ValueError(
            f"{folder}: tokenizer.json or vocab.json, merges.txt, tokenizer_config.json: {error!r:.200}"
        )
    tokenizer.normalizer, tokenizer.decoder = normalizers.NFC(), decoders.ByteLevel()
    split, to_bytes = (
        pre_tokenizers.Split(Regex(WORD), "isolated"),
        pre_tokenizers.ByteLevel(False, use_regex=False),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    return tokenizer


DTYPES = {
    "auto": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
STORED = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}  # by safetensors' names


def find_tensors(folder: Path, model: nn.Module) -> dict[str, dict]:
    """Where the model's tensors are: dtype, shape, path, offset. Raises ValueError if it's not those and no others."""
    lone, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    require(
        index.exists() or lone.exists(),
        f"{folder}: expected {lone.name} or its index (no pickles are read)",
    )
    weight_map = (
        checked(read_json(index).get("weight_map"), dict, "weight_map")
        if index.exists()
        else {"": lone.name}
    )
    found = {}
    for name in sorted({str(file) for file in weight_map.values()}):
        require(
            Path(name).name == name,
            f"{index} names {name!r:.60}; expected a file in the same folder",
        )
        try:
            safe_open(folder / name, "pt")  # checks the header, and that the file is whole
            with open(folder / name, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{folder / name}: {error}; expected a whole safetensors file"
            ) from error
        for key in header.keys() - {
            "__metadata__",
            "audio_encoder.embed_positions.inv_timescales",
        }:  # not needed
            if weight_map.get(key, name) == name:
                offset = 8 + length + header[key]["data_offsets"][0]
                found[key] = header[key] | {"path": folder / name, "offset": offset}
    shapes = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
    misshaped = [key for key in shapes if key in found and found[key]["shape"] != shapes[key]]
    problems = {
        "missing": [key for key in shapes if key not in found],
        "unexpected": sorted(found.keys() - shapes.keys()),
        "misshaped": [f"{key} {found[key]['shape']} for {shapes[key]}" for key in misshaped],
        "not " + " or ".join(STORED): sorted(
            key for key in found if found[key]["dtype"] not in STORED
        ),
    }
    listed = (f"{len(keys)} {what} (first: {keys[0]})" for what, keys in problems.items() if keys)
    require(
        not any(problems.values()),
        f"{folder}: the tensors don't fit config.json: {'; '.join(listed)}",
    )
    return found


LORA_FIXED = {  # of adapter_config.json: with other values, it would not be W + alpha / r B A alone
    "peft_type": "LORA",
    "bias": "none",
    "lora_bias": False,
    "use_dora": False,
    "use_rslora": False,
    "use_qalora": False,
    "modules_to_save": None,
    "fan_in_fan_out": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "layer_replication": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "alora_invocation_tokens": None,
}
NEW_BASE = (
    "pissa",
    "olora",
    "corda",
    "loftq",
)  # ways to begin an adapter that change the weights beside it, too


def read_lora(
    folder: Path, model: nn.Module
) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    """A LoRA adapter as peft saves it: name of a weight -> (A [r, in], B [out, r], scale), for W + scale B A. Raises
    ValueError for what is not plain LoRA or fits no weight of the model."""
    config, where = (
        {"peft_type": None} | read_json(folder / "adapter_config.json"),
        "adapter_config.json: ",
    )
    require_fixed(config, LORA_FIXED, where)
    begun = config.get("init_lora_weights")
    require(
        not str(begun).startswith(NEW_BASE),
        f"{where}init_lora_weights is {begun!r:.60}, which is not supported",
    )
    rank = checked(config.get("r"), int, where + "r")
    scale = checked(config.get("lora_alpha"), float, where + "lora_alpha") / rank
    try:
        tensors = load_file(folder / "adapter_model.safetensors")
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{folder}: adapter_model.safetensors: {error}; expected a whole file"
        ) from error
    lora = {}
    for key in sorted(tensors):
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_[AB]\.weight", key)
        name = match[1] + ".weight" if match else ""
        pair = [
            tensors.get(re.sub("lora_[AB]", f"lora_{part}", key), torch.empty(0)) for part in "AB"
        ]
        out, *into = model.state_dict().get(name, torch.empty(0)).shape
        fits = [list(part.shape) for part in pair] == [[rank, *into], [out, rank]] and len(
            into
        ) == 1
        require(
            fits, f"{folder}: {key} fits no weight with rank {rank}, or its other half is missing"
        )
        lora[name] = pair[0].float(), pair[1].float(), scale
    require(
        len(lora) > 0, f"{folder}: adapter_model.safetensors: expected pairs of lora_A and lora_B"
    )
    return lora


def read_shard(
    path: Path, entries: dict, device: torch.device, dtype: torch.dtype, lora: dict
) -> dict:
    """Tensors of one file, to device and type, in blocks: a mapped file's pages would count as our memory. What LoRA
    changes is float32 until B A is added, and is rounded once."""
    tensors, buffer = {}, torch.empty(1 << 24, dtype=torch.uint8)
    with open(path, "rb") as file:
        for key, entry in sorted(
            entries.items(), key=lambda item: item[1]["offset"]
        ):  # as they lie on the disk
            kept = torch.float32 if key in lora else dtype
            tensors[key] = torch.empty(entry["shape"], dtype=kept, device=device)
            raw = buffer.view(STORED[entry["dtype"]])
            file.seek(entry["offset"])
            for block in tensors[key].view(-1).split(len(raw)):
                file.readinto(raw[: len(block)].view(torch.uint8).numpy())
                block.copy_(raw[: len(block)])
            if key in lora:
                A, B, scale = lora[key]
                tensors[key] = (tensors[key] + scale * (B.to(device) @ A.to(device))).to(dtype)
    return tensors


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA, else MPS, else the CPU."""
    if name == "auto":
        name = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
    try:
        torch.ones(1, device=name).item()
        return torch.device(name)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(
            f"device {name!r} can't be used ({error!s:.200}); expected auto, cuda, mps or cpu"
        ) from error


# ---- prompt and model ----
CLIP = (
    "<|audio_bos|>",
    "<|AUDIO|>",
    "<|audio_eos|>",
)  # a clip's placeholder; the middle may be repeated
PLACEHOLDER = re.compile("{}(?:{})+{}".format(*map(re.escape, CLIP)))
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
USER = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"

Prompt = namedtuple("Prompt", "ids mels")  # int64 [N]; a list, for each clip bfloat16 [128, T]


class MossAudio(nn.Module):
    """The whole model. Submodules have the checkpoint's names."""

    def __init__(self, config: MossConfig, tokenizer: Tokenizer):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.audio_encoder = AudioEncoder(config.encoder)
        self.audio_adapter = GatedMLP(config.adapter)
        mergers = (GatedMLP(config.adapter) for _ in config.encoder.deepstack_encoder_layer_indexes)
        self.deepstack_audio_merger_list = nn.ModuleList(mergers)
        self.language_model = Qwen3(config.decoder)
        self.lm_head = Linear(config.decoder.hidden_size, config.decoder.vocab_size)

    @classmethod
    def from_pretrained(
        cls, folder, device="auto", dtype="auto", report=lambda line: None, lora=None
    ):
        """The model in a checkpoint folder, for inference: no parameter requires a gradient. device: "auto" is CUDA,
        else MPS, else the CPU. dtype: float32, bfloat16, float16, or "auto", float32 on the CPU and elsewhere the type
        of the stored lm_head. report is called with a line for each shard. lora: the folder of an adapter, as peft
        saves it, to add to the weights. Raises ValueError."""
        folder, device = Path(folder), pick_device(device)
        require(dtype in DTYPES, f"dtype is {dtype!r}; expected {', '.join(DTYPES)}")
        config, tokenizer = read_config(folder), load_tokenizer(folder)
        (
            tokenizer.no_truncation(),
            tokenizer.no_padding(),
        )  # a tokenizer.json may have been saved with either
        largest, vocab_size = (
            max(tokenizer.get_vocab().values(), default=0),
            config.decoder.vocab_size,
        )
        require(
            largest < vocab_size,
            f"{folder}: the tokenizer has id {largest}; expected below {vocab_size}",
        )
        with torch.device("meta"):  # shapes without memory
            model = cls(config, tokenizer).requires_grad_(False).eval()
        found, adapter = find_tensors(folder, model), read_lora(Path(lora), model) if lora else {}
        dtype = (
            DTYPES[dtype]
            or STORED["F32" if device.type == "cpu" else found["lm_head.weight"]["dtype"]]
        )
        if (
            device.type == "cuda" and dtype == torch.float32
        ):  # TF32 keeps ten bits of a factor: that is not float32
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        tensors, shards = {}, sorted({at["path"] for at in found.values()})
        for i, shard in enumerate(shards):
            report(f"loading {shard.name} ({i + 1} of {len(shards)})")
            entries = {key: at for key, at in found.items() if at["path"] == shard}
            tensors |= read_shard(shard, entries, device, dtype, adapter)
        model.load_state_dict(tensors, assign=True)
        return model

    def prompt_ids(self, text: str, lengths=(), time_markers: bool | None = None) -> list[int]:
        """A text and its clips' lengths in samples to the ids of a prompt; see prompt."""
        config, most = self.config, self.config.decoder.max_position_embeddings
        require(
            not re.search("[\ud800-\udfff]", text),
            "the prompt has bytes that are not UTF-8; expected text",
        )
        if not PLACEHOLDER.search(text):
            text = SYSTEM + USER.format("".join(CLIP) * len(lengths) + "\n" * bool(lengths) + text)
        stretches = PLACEHOLDER.split(
            text
        )  # each tokenized on its own, or BPE would merge across a clip
        tokens = [
            self.tokenizer.encode(stretch, add_special_tokens=False).ids for stretch in stretches
        ]
        slots, sounds = (
            len(stretches) - 1,
            [part for part in CLIP for stretch in stretches if part in stretch],
        )
        require(
            slots == len(lengths),
            f"the prompt has {slots} audio placeholders; expected {len(lengths)}",
        )
        require(
            not sounds and config.adapter.audio_token_id not in sum(tokens, []),
            f"the prompt's text has a token that stands for sound; expected whole placeholders, {''.join(CLIP)}",
        )
        markers = config.adapter.enable_time_marker if time_markers is None else time_markers
        ids = tokens[0]
        for length, after in zip(lengths, tokens[1:]):
            ids += (
                audio_ids(
                    count_tokens(length // HOP, config.encoder.n_window), config.adapter, markers
                )
                + after
            )
        require(
            len(ids) <= most,
            f"the prompt has {len(ids)} tokens; expected at most {most}, the model's positions",
        )
        return ids

    def prompt(self, text: str, clips=(), time_markers: bool | None = None) -> Prompt:
        """A text and its clips (what load_audio takes) to the model's input. A text without placeholders (<|audio_bos|>
        <|AUDIO|><|audio_eos|>) is wrapped as a user's, behind the clips. time_markers: None is as processor_config.json
        says. Raises ValueError for bad sound, placeholders that don't match the clips, and too many tokens."""
        waves = [
            load_audio(clip) for clip in (clips if isinstance(clips, (list, tuple)) else [clips])
        ]
        ids = self.prompt_ids(text, [len(wave) for wave in waves], time_markers)
        return Prompt(torch.tensor(ids), [log_mel(wave) for wave in waves])

    def embed_ids(
        self, ids: torch.Tensor, output=None, taps=()
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Ids [B, N] and the encoder's rows for their audio tokens, output and taps [A, E], to what enters the decoder,
        [B, N, D], and the DeepStack rows for its first layers, [B, N, D] each."""
        x, is_audio = (
            self.language_model.embed_tokens(ids),
            ids == self.config.adapter.audio_token_id,
        )
        if output is None:
            return x, []
        deepstack = [merger(tap) for merger, tap in zip(self.deepstack_audio_merger_list, taps)]
        return splice(x, self.audio_adapter(output), is_audio), [
            deepstack_rows(rows, is_audio) for rows in deepstack
        ]

    def embed(self, prompt: Prompt) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """embed_ids of a prompt, [1, N, D]."""
        sound = self.audio_encoder(prompt.mels) if prompt.mels else ()
        return self.embed_ids(prompt.ids[None].to(self.lm_head.weight.device), *sound)

    def forward(self, prompt: Prompt) -> torch.Tensor:
        """The logits of every position, float32 [N, V]."""
        x, deepstack = self.embed(prompt)
        positions = torch.arange(len(prompt.ids), device=x.device)[None]
        return self.lm_head(self.language_model(x, positions, deepstack=deepstack))[0].float()

    def fit(self, prompt: Prompt, sampling: Sampling) -> Sampling:
        """Cuts max_new_tokens to the positions that a prompt leaves free, and warns. ValueError if there is none."""
        used, most = len(prompt.ids), self.config.decoder.max_position_embeddings
        require(
            used < most,
            f"the prompt has {used} tokens; to generate, expected fewer than the {most} positions",
        )
        if (wanted := sampling.max_new_tokens) > (free := most - used):
            warnings.warn(
                f"max_new_tokens is cut from {wanted} to {free}: the model has {most} positions"
            )
        return replace(sampling, max_new_tokens=min(wanted, free))

    def generate(
        self,
        prompt: Prompt,
        max_new_tokens=1024,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        seed=None,
        thinking_budget=None,
        cuda_graph=True,
        report=None,
    ) -> Iterator[int]:
        """The answer's ids, one by one, up to and with the first stop id; see sample.Sampling for the arguments.
        cuda_graph: on CUDA, capture a step once and replay it. report is called with lines on how a long prompt goes.
        Raises ValueError, at the call, for an argument out of range or no position free (see fit)."""
        sampling = Sampling(max_new_tokens, temperature, top_p, top_k, seed, thinking_budget)
        return generate(self, prompt, self.fit(prompt, sampling), cuda_graph, report)

    def generate_batch(
        self,
        prompts: list,
        max_new_tokens=1024,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        seed=None,
        thinking_budget=None,
        cuda_graph=True,
        report=None,
    ) -> Iterator[tuple[int, list[int]]]:
        """generate for several prompts at once: (number of the prompt, its ids) of each as it ends. seed: prompt i
        draws with seed + i, or with item i of a list."""
        listed = isinstance(seed, list)
        sampling = Sampling(
            max_new_tokens, temperature, top_p, top_k, None if listed else seed, thinking_budget
        )
        seeds = (
            seed if listed else [seed if seed is None else seed + i for i in range(len(prompts))]
        )
        samplings = [
            self.fit(prompt, replace(sampling, seed=own))
            for prompt, own in zip(prompts, seeds, strict=True)
        ]
        return generate_batch(self, prompts, samplings, cuda_graph, report)

    def ask(
        self,
        clips,
        text: str,
        time_markers=None,
        max_new_tokens=1024,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        seed=None,
        thinking_budget=None,
    ) -> str:
        """The answer to a text about a clip or a list of clips; see prompt and generate for the arguments."""
        prompt = self.prompt(text, clips, time_markers)
        ids = self.generate(
            prompt, max_new_tokens, temperature, top_p, top_k, seed, thinking_budget
        )
        return self.tokenizer.decode(list(ids))


# ---- command line ----
TINY = Path(__file__).resolve().parent / "tiny"  # the small checkpoint
SAMPLE = TINY / "bell.wav"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options for the model and for generating."""
    add = parser.add_argument
    add(
        "--model", default=TINY, metavar="FOLDER", help="checkpoint folder (the small one in tiny/)"
    )
    add(
        "--lora",
        metavar="FOLDER",
        help="adapter to add to its weights, as peft or tools/train.py saves it",
    )
    add("--device", default="auto", help="auto (the first that is there of), cuda, mps, cpu")
    add(
        "--dtype",
        default="auto",
        help="auto (float32 on a CPU, else the checkpoint's), float32, bfloat16, float16",
    )
    add(
        "--max-new-tokens",
        type=int,
        default=1024,
        metavar="N",
        help="end the answer after N tokens (%(default)s)",
    )
    heat = parser.add_mutually_exclusive_group().add_argument
    heat(
        "--temperature",
        type=float,
        default=1.0,
        metavar="X",
        help="below 1 keeps to likelier tokens (%(default)s)",
    )
    heat(
        "--greedy",
        dest="temperature",
        action="store_const",
        const=0,
        default=1.0,
        help="the likeliest token always",
    )
    add(
        "--top-p",
        type=float,
        default=1.0,
        metavar="X",
        help="the likeliest tokens that make up X together (1.0: all)",
    )
    add(
        "--top-k",
        type=int,
        default=50,
        metavar="N",
        help="the N likeliest tokens (%(default)s; 0: all)",
    )
    add("--seed", type=int, metavar="N", help="draw the same answer each time")
    add(
        "--no-time-markers",
        dest="time_markers",
        action="store_false",
        default=None,
        help="no seconds in the prompt",
    )
    add("--thinking-budget", type=int, metavar="N", help="end a thought after N tokens")
    add(
        "--no-cuda-graph",
        dest="cuda_graph",
        action="store_false",
        help="on CUDA, launch each step's kernels anew",
    )


def generation_options(args: argparse.Namespace) -> dict:
    """generate's arguments among the options. Raises ValueError for one that is out of range."""
    options = {field.name: getattr(args, field.name) for field in fields(Sampling)}
    Sampling(**options)
    return options | {"cuda_graph": args.cuda_graph}


def out_of_memory(error: Exception) -> bool:
    """Whether memory ran out: torch's CPU allocator raises a mere RuntimeError."""
    return isinstance(
        error, (MemoryError, torch.OutOfMemoryError)
    ) or "can't allocate memory" in str(error)


def peak_bytes(device: torch.device) -> int:
    """The most memory that was held so far: on CUDA by tensors, else by the process (0 on Windows, which can't say)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource  # which Windows lacks

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def run(args: argparse.Namespace) -> None:
    """Prints the answer as it is generated and, unless quiet, how it goes to stderr."""
    report = (
        (lambda line: None)
        if args.quiet
        else (lambda line: print(line, file=sys.stderr, flush=True))
    )
    if not args.audio and args.prompt is None:
        args.audio = [str(SAMPLE)]
        report(f"no AUDIO and no --prompt: this is {SAMPLE}")
    options = generation_options(args)  # refused before all else
    waves = [
        load_audio(sys.stdin and sys.stdin.buffer if name == "-" else name) for name in args.audio
    ]
    model = MossAudio.from_pretrained(args.model, args.device, args.dtype, report, args.lora)
    for name, wave in zip(args.audio, waves):
        report(f"{name}: {len(wave) / SAMPLE_RATE:.2f} s")
    text, times = (
        "Describe this audio." if args.prompt is None else args.prompt,
        [time.perf_counter()],
    )
    prompt = model.prompt(text, waves, args.time_markers)
    report(f"prompt: {len(prompt.ids)} tokens")
    ids = model.generate(prompt, **options, report=report)
    pieces = stream_text(
        model.tokenizer, (times.append(time.perf_counter()) or token for token in ids)
    )
    if args.hide_thinking:
        pieces = stream_answer(pieces, opened="<think>" in text.rpartition("</think>")[2])
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
    finally:
        print(flush=True)
    tokens, first, rest = len(times) - 1, times[1] - times[0], times[-1] - times[1]
    report(
        f"{tokens} new tokens: the first after {first:.2f} s, then {(tokens - 1) / max(rest, 1e-9):.1f} a second"
    )
    device = model.lm_head.weight.device
    if peak := peak_bytes(device):
        report(f"peak memory: {peak / 1e9:.2f} GB{' on the GPU' if device.type == 'cuda' else ''}")


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser("moss_min.py", allow_abbrev=False)
    parser.error, add = (
        lambda message: require(False, message),
        parser.add_argument,
    )  # its own error prints the usage
    add(
        "audio",
        nargs="*",
        metavar="AUDIO",
        help="sound files, the clips of one prompt; - is one from stdin",
    )
    add("--prompt", metavar="TEXT", help="what to ask; with AUDIO: Describe this audio.")
    add_options(parser)
    add("--hide-thinking", action="store_true", help="print the answer alone")
    add("--quiet", action="store_true", help="print nothing on stderr but what goes wrong")
    warnings.formatwarning = lambda message, *_: f"moss_min: {message}\n"
    try:
        run(parser.parse_args(argv))
    except KeyboardInterrupt:
        return 130
    except (
        BrokenPipeError
    ):  # the reader has enough; what is left goes nowhere, or Python complains at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        if not isinstance(error, (ValueError, OSError)) and not out_of_memory(error):
            raise
        print(f"moss_min: {' '.join(str(error).split()):.380}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdout and sys.stdout.reconfigure(
        errors="replace"
    )  # a terminal without such characters gets question marks
    sys.exit(main())
