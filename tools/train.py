"""Trains and fine-tunes MOSS-Audio on upstream's JSONL: all weights, or a LoRA adapter in peft's own files.

    python tools/train.py --model FOLDER --data train.jsonl --out FOLDER [--lora-rank N] [--steps N --lr X ...]
    python tools/train.py --model FOLDER --merge ADAPTER --out FOLDER

A line of data is {"conversation": [{"role": "user", "message_type": "audio", "content": PATH}, {"role": "user",
"message_type": "text", "content": PROMPT}, {"role": "assistant", "message_type": "text", "content": ANSWER}]}; paths
are relative to the file. A sample is the prompt as inference makes it, time markers too, then the answer and
<|im_end|>, which alone are learned. OUT becomes a checkpoint folder (with LoRA, an adapter's); OUT/training has the
log, and the state from which the same command goes on. `torchrun --nproc-per-node N tools/train.py ...` trains in N
processes."""

import argparse, contextlib, json, math, os, re, shutil, sys, tempfile, time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import soundfile
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from encoder import HOP, SAMPLE_RATE, load_audio, require
from moss_min import MossAudio, load_tokenizer, pick_device, read_config

IGNORE = -100  # the label of a token that is not learned
DECODER_TARGETS = (
    r"language_model\.layers\.\d+\.(self_attn|mlp)\."
    r"(q_proj|k_proj|v_proj|o_proj|up_proj|gate_proj|down_proj)"
)
ENCODER_TARGETS = r"audio_encoder\.layers\.\d+\.self_attn\.(q_proj|k_proj|v_proj)"
Sample = namedtuple(
    "Sample", "ids labels mels"
)  # int64 [N], int64 [N], a list of bfloat16 [128, T]


# ---- data ----
def read_line(line: str | bytes, folder: Path) -> tuple[list[Path], str, str]:
    """A line of data to its sounds' paths, its prompt and its answer. Raises ValueError if it's not as it should be."""
    try:
        turns = [
            (turn["role"], turn["message_type"], turn["content"])
            for turn in json.loads(line)["conversation"]
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"expected turns of role, message_type and content, not this ({error!r:.60})"
        ) from error
    clips, prompts, answers = (
        [content for *turn, content in turns if turn == kind and isinstance(content, str)]
        for kind in (["user", "audio"], ["user", "text"], ["assistant", "text"])
    )
    require(len(clips) > 0, "no audio")
    require(len(prompts) == 1, f"{len(prompts)} texts of the user's; expected one")
    require(any(map(str.strip, answers)), "no answer")
    require(len(answers) == 1, f"{len(answers)} answers; expected one")
    return [folder / clip for clip in clips], prompts[0], answers[0]


def count_samples(path: Path) -> int:
    """A sound file's length in samples at 16 kHz, from its header where soundfile can read that (a sample's rounding
    more or less decides nothing). Raises ValueError for what is not sound."""
    try:
        info = soundfile.info(str(path))
        samples = math.ceil(info.frames * SAMPLE_RATE / info.samplerate)
    except soundfile.SoundFileError:
        samples = 0
    return samples if samples > HOP else len(load_audio(path))  # which refuses what is too short


def read_data(path: Path, model: MossAudio) -> list[tuple[list[Path], str, str]]:
    """All of a data file. Raises ValueError that names by number the lines that can't be learned from: before the first
    step, not in the middle of the night."""
    lines, wrong, most = [], [], model.config.decoder.max_position_embeddings
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            clips, prompt, answer = read_line(line, path.parent)
            lengths = [count_samples(clip) for clip in clips]
            used = len(model.prompt_ids(prompt, lengths)) + len(learned_ids(model, answer))
            require(
                used <= most,
                f"{used} tokens with its answer; expected at most {most}, the model's positions",
            )
            lines.append((clips, prompt, answer))
        except ValueError as error:
            wrong.append(f"line {number}: {error}")
    require(not wrong, f"{path}: {len(wrong)} bad lines: {'; '.join(wrong[:3])}")
    require(len(lines) > 0, f"{path}: expected at least one line")
    return lines


def learned_ids(model: MossAudio, answer: str) -> list[int]:
    require(
        not re.search("[\ud800-\udfff]", answer),
        "the answer has bytes that are not UTF-8; expected text",
    )
    ids = model.tokenizer.encode(answer, add_special_tokens=False).ids
    require(
        model.config.adapter.audio_token_id not in ids,
        "the answer has a token that stands for sound",
    )
    return [*ids, model.tokenizer.token_to_id("<|im_end|>")]


def make_sample(
    model: MossAudio, text: str, clips, answer: str, time_markers: bool | None = None
) -> Sample:
    """A prompt as inference makes it, and the answer with its <|im_end|>, which alone are labels."""
    prompt, learned = (
        model.prompt(text, clips, time_markers),
        torch.tensor(learned_ids(model, answer)),
    )
    labels = torch.cat([torch.full_like(prompt.ids, IGNORE), learned])
    return Sample(torch.cat([prompt.ids, learned]), labels, prompt.mels)


# ---- forward and loss ----
def batch_hidden(model: MossAudio, samples: list[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples to hidden states [B, N, D] and labels [B, N], padded on the right, where causal attention does not look.
    Chunks are padded to the longest of their prompt (encoder.split_chunks), not of the batch: so the encoder runs once
    for all samples whose longest chunks are equal, and every sample's rows are those that inference has."""
    device, chunk = model.lm_head.weight.device, 2 * model.config.encoder.n_window
    ids = nn.utils.rnn.pad_sequence([sample.ids for sample in samples], batch_first=True).to(device)
    labels = nn.utils.rnn.pad_sequence(
        [sample.labels for sample in samples], batch_first=True, padding_value=IGNORE
    )
    counts = (ids == model.config.adapter.audio_token_id).sum(1).tolist()
    groups, rows = (
        {},
        {},
    )  # frames of the longest chunk -> samples; sample -> its rows of the output and of each tap
    for i, sample in enumerate(samples):
        groups.setdefault(
            max((min(mel.shape[1], chunk) for mel in sample.mels), default=0), []
        ).append(i)
    for members in (members for longest, members in groups.items() if longest):
        output, taps = model.audio_encoder([mel for i in members for mel in samples[i].mels])
        split = (part.split([counts[i] for i in members]) for part in (output, *taps))
        rows.update(zip(members, zip(*split)))
    output, *taps = (
        (torch.cat(part) for part in zip(*(rows[i] for i in sorted(rows)))) if rows else (None,)
    )
    x, deepstack = model.embed_ids(ids, output, taps)
    positions = torch.arange(ids.shape[1], device=device)[None]
    return model.language_model(x, positions, deepstack=deepstack), labels.to(device)


class SummedLoss(nn.Module):
    """Samples to the cross-entropy summed over what is learned: a module, since DistributedDataParallel wraps one."""

    def __init__(self, model: MossAudio):
        super().__init__()
        self.model = model

    def forward(self, samples: list[Sample]) -> torch.Tensor:
        hidden, labels = batch_hidden(self.model, samples)
        learned = (
            labels[:, 1:] != IGNORE
        )  # position n predicts token n + 1; logits are made for these alone
        logits = self.model.lm_head(hidden[:, :-1][learned]).float()
        return F.cross_entropy(logits, labels[:, 1:][learned], reduction="sum")


def random_model(folder: Path, seed: int) -> MossAudio:
    """A model with a checkpoint folder's configuration and tokenizer and random weights (as PyTorch draws them)."""
    torch.manual_seed(seed)
    model = MossAudio(read_config(folder), load_tokenizer(folder))
    nn.init.normal_(model.language_model.embed_tokens.weight, std=0.02)
    return model


# ---- LoRA ----
class LoraLinear(nn.Module):
    """A frozen linear map plus scale B A (LoRA, arXiv 2106.09685); B begins at zero."""

    def __init__(self, base: nn.Linear, rank: int, scale: float):
        super().__init__()
        self.base, self.scale = base, scale
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, device=base.weight.device)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, device=base.weight.device)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.scale * self.lora_B(self.lora_A(x))


def add_lora(model: MossAudio, rank: int, alpha: float, with_encoder: bool) -> str:
    """Puts a LoraLinear in place of each target and freezes all else; returns the targets' regular expression."""
    targets = f"{DECODER_TARGETS}|{ENCODER_TARGETS}" if with_encoder else DECODER_TARGETS
    model.requires_grad_(False)
    for name in [name for name, _ in model.named_modules() if re.fullmatch(targets, name)]:
        parent, _, child = name.rpartition(".")
        setattr(
            model.get_submodule(parent),
            child,
            LoraLinear(model.get_submodule(name), rank, alpha / rank),
        )
    return targets


def save_adapter(model: MossAudio, out: Path, rank: int, alpha: float, targets: str) -> None:
    """The LoRA weights as peft's adapter_model.safetensors and adapter_config.json. The targets are a regular
    expression: by their names alone, peft would take the projectors' gate_proj, up_proj and down_proj too."""
    trained = {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    tensors = {
        f"base_model.model.{name}": tensor.detach().float().cpu()
        for name, tensor in trained.items()
    }
    write_tensors(tensors, out / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": targets,
        "base_model_name_or_path": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }
    write_text(json.dumps(config, indent=1), out / "adapter_config.json")


# ---- files ----
def write_text(text: str, path: Path) -> None:
    """Writes beside the file and renames: what stands there is always whole."""
    path.with_name(path.name + ".part").write_text(text)
    os.replace(path.with_name(path.name + ".part"), path)


UMASK = os.umask(0)  # it can be read only by setting it
os.umask(UMASK)


def write_tensors(
    tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    part = path.with_name(path.name + ".part")
    save_file(tensors, part, metadata or {"format": "pt"})
    part.chmod(0o666 & ~UMASK)  # save_file lets nobody else read it
    os.replace(part, path)


def save_checkpoint(
    model: MossAudio, out: Path, source: Path, shard_bytes: int = 5_000_000_000
) -> None:
    """The model in the released layout: bfloat16, in shards with an index if larger than one; all else from source. No
    file that stands in out is touched before all new ones are whole."""
    out.mkdir(parents=True, exist_ok=True)
    shards, size, tensors = [{}], 0, model.state_dict()
    for name, tensor in sorted(tensors.items()):
        if size + 2 * tensor.numel() > shard_bytes and shards[-1]:
            shards, size = [*shards, {}], 0
        shards[-1][name], size = tensor, size + 2 * tensor.numel()
    files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    files, index = (
        files if len(shards) > 1 else ["model.safetensors"],
        "model.safetensors.index.json",
    )
    with tempfile.TemporaryDirectory(prefix=".part-", dir=out) as part:
        for shard, file in zip(shards, files):
            rounded = {
                name: tensor.to("cpu", torch.bfloat16).contiguous()
                for name, tensor in shard.items()
            }
            write_tensors(rounded, Path(part, file))
        if len(shards) > 1:
            weight_map = {name: file for shard, file in zip(shards, files) for name in shard}
            total = sum(2 * tensor.numel() for tensor in tensors.values())
            content = {"metadata": {"total_size": total}, "weight_map": weight_map}
            Path(part, index).write_text(json.dumps(content, indent=2))
        for file in source.iterdir():
            if file.suffix in (".json", ".txt", ".jinja") and not file.name.endswith(".index.json"):
                shutil.copyfile(file, Path(part, file.name))
        written = {file.name for file in Path(part).iterdir()}
        for name in sorted(written):
            os.replace(Path(part, name), out / name)
    for old in [
        out / index,
        out / "model.safetensors",
        *out.glob("model-?????-of-?????.safetensors"),
    ]:
        if old.name not in written:
            old.unlink(
                missing_ok=True
            )  # an index that stays would lead to the weights before these


# ---- training ----
def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up from 0, then half a cosine that would come to 0 at the step after the last."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def draw(lines: list, seed: int, first: int, count: int) -> list:
    """Lines first to first + count - 1 of an endless sequence: epoch after epoch, each in an order of its own."""
    orders = {}

    def line(i: int):
        epoch, place = divmod(i, len(lines))
        if epoch not in orders:
            orders[epoch] = torch.randperm(
                len(lines), generator=torch.Generator().manual_seed(seed + epoch)
            ).tolist()
        return lines[orders[epoch][place]]

    return [line(i) for i in range(first, first + count)]


def save_state(
    optimizer: torch.optim.AdamW, trained: dict, step: int, run: dict, folder: Path
) -> None:
    """Weights in float32, AdamW's moments and the random state: load_state goes on as if it had never stopped."""
    tensors = {"random_state": torch.get_rng_state()}
    for name, parameter in trained.items():
        tensors[f"weight.{name}"] = parameter.detach().cpu().contiguous()
        for moment in ("exp_avg", "exp_avg_sq"):
            tensors[f"{moment}.{name}"] = optimizer.state[parameter][moment].cpu().contiguous()
    write_tensors(tensors, folder / "state.safetensors", {"run": json.dumps(run | {"step": step})})


def load_state(
    optimizer: torch.optim.AdamW, trained: dict[str, nn.Parameter], run: dict, folder: Path
) -> int:
    """Goes on from the last saved state, if there is one; returns the number of steps made. Raises ValueError for the
    state of another run."""
    if not (folder / "state.safetensors").exists():
        return 0
    with safe_open(folder / "state.safetensors", "pt") as file:
        saved = json.loads(file.metadata()["run"])
        step = saved.pop("step")
        other = [name for name in run if saved.get(name) != run[name]]
        require(
            not other,
            f"{folder} is of a run with another {', '.join(other)}; expected the same, or another --out",
        )
        torch.set_rng_state(file.get_tensor("random_state"))
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(file.get_tensor(f"weight.{name}"))
                optimizer.state[parameter] = {"step": torch.tensor(float(step))}
                for moment in ("exp_avg", "exp_avg_sq"):
                    optimizer.state[parameter][moment] = file.get_tensor(f"{moment}.{name}").to(
                        parameter.device
                    )
    return step


def train(model: MossAudio, lines: list, args: argparse.Namespace) -> None:
    """Trains the parameters that require a gradient; a step is a line on stderr and one in OUT/training/log.jsonl."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    trained = {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    matrices = [parameter for parameter in trained.values() if parameter.ndim > 1]
    others = [
        parameter for parameter in trained.values() if parameter.ndim < 2
    ]  # norms and biases: no decay
    groups = [
        {"params": matrices, "weight_decay": args.decay},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], betas=(0.9, 0.95))
    folder, device = Path(args.out) / "training", model.lm_head.weight.device
    run = {name: value for name, value in vars(args).items() if name not in ("out", "save_every")}
    run["processes"] = world
    folder.mkdir(parents=True, exist_ok=True)
    start = load_state(optimizer, trained, run, folder)
    log = folder / "log.jsonl"
    kept = (
        [line for line in log.read_text().splitlines() if json.loads(line)["step"] <= start]
        if log.exists()
        else []
    )
    summed = (
        nn.parallel.DistributedDataParallel(SummedLoss(model)) if world > 1 else SummedLoss(model)
    )
    size, began, seen = args.batch * args.accumulate, time.perf_counter(), 0

    def samples_of(step: int) -> list[Sample]:
        chosen = draw(lines, args.seed, (step * world + rank) * size, size)
        return [make_sample(model, prompt, clips, answer) for clips, prompt, answer in chosen]

    with ThreadPoolExecutor(1) as ahead:  # sound is read one step ahead
        following = ahead.submit(samples_of, start)
        for step in range(start, args.steps):
            samples = following.result()
            following = ahead.submit(samples_of, min(step + 1, args.steps - 1))
            learned = sum(int((sample.labels != IGNORE).sum()) for sample in samples)
            totals = torch.tensor(
                [learned, sum(len(sample.ids) for sample in samples), 0.0], device=device
            )
            if world > 1:
                dist.all_reduce(
                    totals
                )  # every learned token weighs the same, whichever process has it
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args.steps, args.lr, args.warmup)
            for first in range(0, size, args.batch):
                alone = (
                    contextlib.nullcontext()
                    if world == 1 or first + args.batch == size
                    else summed.no_sync()
                )
                with (
                    alone,
                    torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"),
                ):
                    loss = summed(samples[first : first + args.batch])
                    (
                        loss * world / totals[0]
                    ).backward()  # DistributedDataParallel divides by the processes
                totals[2] += loss.detach()
            norm = nn.utils.clip_grad_norm_(trained.values(), args.clip)
            optimizer.step()
            optimizer.zero_grad()
            if world > 1:
                dist.reduce(totals[2:], 0)
            if rank == 0:
                seen += int(totals[1])
                loss, lr = float(totals[2] / totals[0]), optimizer.param_groups[0]["lr"]
                spent = time.perf_counter() - began
                minutes = spent / (step + 1 - start) * (args.steps - step - 1) / 60
                print(
                    f"step {step + 1}/{args.steps}: loss {loss:.4f}, lr {lr:.2e}, gradient {float(norm):.2f}, "
                    f"{seen / spent:.0f} tokens a second, {minutes:.1f} minutes left",
                    file=sys.stderr,
                    flush=True,
                )
                kept.append(json.dumps({"step": step + 1, "loss": loss, "lr": lr}))
                write_text("\n".join(kept) + "\n", log)
                if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
                    save_state(optimizer, trained, step + 1, run, folder)


# ---- command line ----
def run(args: argparse.Namespace) -> None:
    out, source = Path(args.out), Path(args.model or args.init)
    if args.merge:
        save_checkpoint(
            MossAudio.from_pretrained(source, "cpu", "bfloat16", lora=args.merge), out, source
        )
        return
    require(args.data, "expected --data or --merge")
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    device = (
        f"cuda:{os.environ['LOCAL_RANK']}"
        if world > 1 and torch.cuda.is_available()
        else args.device
    )
    if args.init:
        model = random_model(source, args.seed).to(pick_device(device))
    else:  # frozen weights may stay in the checkpoint's type, under autocast
        dtype = "auto" if args.lora_rank and pick_device(device).type == "cuda" else "float32"
        model = MossAudio.from_pretrained(source, device, dtype).requires_grad_(True)
    lines = read_data(Path(args.data), model)
    torch.manual_seed(args.seed)  # LoRA's A is random: the same in every process
    if args.lora_rank:
        targets = add_lora(model, args.lora_rank, args.lora_alpha, args.lora_encoder)
    train(model, lines, args)
    if int(os.environ.get("RANK", 0)) == 0:
        if args.lora_rank:
            save_adapter(model, out, args.lora_rank, args.lora_alpha, targets)
        else:
            save_checkpoint(model, out, source)
    if world > 1:
        dist.destroy_process_group()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "train.py",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.error, add = lambda message: require(False, message), parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True).add_argument
    source("--model", metavar="FOLDER", help="checkpoint to go on from")
    source(
        "--init",
        metavar="FOLDER",
        help="checkpoint to take all from but the weights, which are drawn at random",
    )
    add("--data", metavar="FILE", help="JSONL in upstream's format, above")
    add(
        "--out",
        required=True,
        metavar="FOLDER",
        help="what is trained; with training/, its log and state",
    )
    add(
        "--lora-rank",
        type=int,
        default=0,
        metavar="N",
        help="train an adapter of this rank, not all weights",
    )
    add(
        "--lora-alpha",
        type=float,
        default=2.0,
        metavar="X",
        help="the adapter's scale is alpha / rank (%(default)s)",
    )
    add("--lora-encoder", action="store_true", help="adapt the encoder's q, k and v, too")
    add(
        "--merge",
        metavar="ADAPTER",
        help="fold an adapter into the model and save that; no training",
    )
    add("--steps", type=int, default=1000, metavar="N", help="%(default)s")
    add(
        "--batch",
        type=int,
        default=8,
        metavar="N",
        help="samples of a forward pass, in each process (%(default)s)",
    )
    add(
        "--accumulate",
        type=int,
        default=1,
        metavar="N",
        help="forward passes of a step (%(default)s)",
    )
    add("--lr", type=float, default=1e-5, metavar="X", help="highest learning rate (%(default)s)")
    add(
        "--warmup",
        type=int,
        default=50,
        metavar="N",
        help="steps up to it (%(default)s); then half a cosine to 0",
    )
    add(
        "--decay",
        type=float,
        default=0.01,
        metavar="X",
        help="AdamW's weight decay, of matrices (%(default)s)",
    )
    add(
        "--clip",
        type=float,
        default=1.0,
        metavar="X",
        help="largest norm of the gradient (%(default)s)",
    )
    add(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of the order of the data and of random weights (%(default)s)",
    )
    add(
        "--save-every",
        type=int,
        default=100,
        metavar="N",
        help="steps between saved states (%(default)s)",
    )
    add(
        "--device",
        default="auto",
        metavar="D",
        help="auto (the first that is there of), cuda, mps, cpu",
    )
    try:
        args = parser.parse_args(argv)
        for name in (
            "steps",
            "batch",
            "accumulate",
            "lr",
            "warmup",
            "clip",
            "save_every",
            "lora_alpha",
        ):
            require(
                getattr(args, name) > 0, f"--{name.replace('_', '-')}: expected a number above 0"
            )
        require(args.lora_rank >= 0, "--lora-rank: expected a number from 0 up")
        require(
            args.lora_rank or not args.lora_encoder, "--lora-encoder: expected --lora-rank, too"
        )
        require(
            not (args.merge and args.init),
            "--merge: expected --model, whose weights it is folded into",
        )
        run(args)
    except (ValueError, OSError, SafetensorError, torch.OutOfMemoryError) as error:
        print(f"train.py: {' '.join(str(error).split()):.380}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
