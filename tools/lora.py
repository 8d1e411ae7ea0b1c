"""LoRA (arXiv 2106.09685) in peft's files: adapters to read into a model, to train and to save."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import move_files, part_folder, read_object, write_tensors, write_text
from encoder import require
from moss_min import MossAudio, checked, read_config

DECODER_TARGETS = (
    r"language_model\.layers\.\d+\.(self_attn|mlp)\."
    r"(q_proj|k_proj|v_proj|o_proj|up_proj|gate_proj|down_proj)"
)
ENCODER_TARGETS = r"audio_encoder\.layers\.\d+\.self_attn\.(q_proj|k_proj|v_proj)"

# Values of adapter_config.json without which a weight would not be W + lora_alpha / r * B A.
PLAIN = {
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
# Ways to begin an adapter that change the weights beside it, too.
OTHER_BASES = ("pissa", "olora", "corda", "loftq")


def add_lora_option(parser) -> None:
    parser.add_argument("--lora", metavar="FOLDER", help="adapter to add to the model's weights")


def read_scale(path: Path) -> tuple[int, float]:
    """Returns an adapter_config.json's rank and scale. Raises ValueError if it isn't plain LoRA."""
    require(path.exists(), f"{path} is not there; expected an adapter's folder, as peft saves it")
    config = {"peft_type": None} | read_object(path, "an adapter's configuration")
    for key, value in PLAIN.items():
        given = config.get(key, value)
        require(given == value, f"{path}: {key} is {given!r:.60}; only {value!r} is supported")
    begun = config.get("init_lora_weights")
    plain = not str(begun).startswith(OTHER_BASES)
    require(plain, f"{path}: init_lora_weights is {begun!r:.60}, which is not supported")
    rank = checked(config.get("r"), int, f"{path}: r")
    alpha = checked(config.get("lora_alpha"), float, f"{path}: lora_alpha")
    return rank, alpha / rank


def read_pairs(path: Path, rank: int, shapes: dict) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns A [rank, in] and B [out, rank] by their weight's name. Raises ValueError for what
    fits none of the weights of these shapes."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: {error}; expected a whole file") from error
    nothing = torch.empty(0, 0)
    pairs = {}
    for key in sorted(tensors):
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_[AB]\.weight", key)
        name = f"{match[1]}.weight" if match else ""
        A = tensors.get(key.replace("lora_B", "lora_A"), nothing)
        B = tensors.get(key.replace("lora_A", "lora_B"), nothing)
        rows, columns = shapes.get(name, (0, 0))
        fits = match and A.shape == (rank, columns) and B.shape == (rows, rank)
        message = f"{path}: {key} fits no weight with rank {rank}, or its other half is missing"
        require(fits, message)
        finite = bool(A.isfinite().all() and B.isfinite().all())
        require(finite, f"{path}: {key} or its other half holds NaN or infinity; expected neither")
        pairs[name] = (A.float(), B.float())
    require(pairs, f"{path}: expected pairs of lora_A and lora_B")
    return pairs


def lora_change(folder: str | Path | None, checkpoint: str | Path) -> Callable:
    """Returns what from_pretrained takes as `change` to add an adapter to a checkpoint's weights: W
    becomes W + scale B A. Without a folder, nothing changes. Raises ValueError."""
    pairs = {}
    if folder is not None:
        rank, scale = read_scale(Path(folder) / "adapter_config.json")
        with torch.device("meta"):  # names and shapes without memory
            model = MossAudio(read_config(Path(checkpoint)), tokenizer=None)
        matrices = {name: p.shape for name, p in model.named_parameters() if p.ndim == 2}
        pairs = read_pairs(Path(folder) / "adapter_model.safetensors", rank, matrices)

    def change(name: str, stored: Tensor) -> Tensor:
        if name not in pairs:
            return stored
        A, B = pairs[name]
        changed = stored.float() + scale * (B @ A)
        require(bool(changed.isfinite().all()), f"{folder}: {name} overflows; expected less of it")
        return changed

    return change


class LoraLinear(nn.Module):
    """A frozen linear map plus scale B A; B begins at zero."""

    def __init__(self, base: nn.Linear, rank: int, scale: float):
        super().__init__()
        device = base.weight.device
        self.base = base
        self.scale = scale
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, device=device)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, device=device)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scale * self.lora_B(self.lora_A(x))


def add_lora(model: MossAudio, rank: int, alpha: float, with_encoder: bool) -> str:
    """Puts a LoraLinear in place of each target and freezes all else; returns the targets' regular
    expression."""
    targets = f"{DECODER_TARGETS}|{ENCODER_TARGETS}" if with_encoder else DECODER_TARGETS
    model.requires_grad_(False)
    names = [name for name, _ in model.named_modules() if re.fullmatch(targets, name)]
    for name in names:
        parent, _, child = name.rpartition(".")
        adapted = LoraLinear(model.get_submodule(name), rank, alpha / rank)
        setattr(model.get_submodule(parent), child, adapted)
    return targets


def save_adapter(model: MossAudio, out: Path, rank: int, alpha: float, targets: str) -> None:
    """Writes the LoRA weights as peft's adapter_model.safetensors and adapter_config.json. The
    targets are a regular expression: by their names alone, peft would take the projectors'
    gate_proj, up_proj and down_proj, too."""
    tensors = {
        f"base_model.model.{name}": parameter.detach().float().cpu()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": targets,
        "bias": "none",
        "modules_to_save": None,
        "inference_mode": True,
    }
    with part_folder(out / ".part") as part:
        write_tensors(tensors, part / "adapter_model.safetensors")
        write_text(json.dumps(config, indent=1), part / "adapter_config.json")
        move_files(part, out, "adapter_config.json")
