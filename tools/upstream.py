"""Writes what upstream's own code computes, in the format of a port.

    python tools/upstream.py reference.safetensors --upstream MOSS-Audio --model FOLDER -o FILE

It repeats the run that `parity.py dump` has written: the same sound, prompt and dtype. Run it where
upstream's repository runs (transformers), then compare FILE like a port's. MOSS-Audio is a clone of
https://github.com/OpenMOSS/MOSS-Audio.
"""

import importlib.machinery
import importlib.util
import itertools
import json
import sys
import types
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import write_tensors
from encoder import require
from moss_min import DTYPES, Parser, end, read_config


def load_upstream(folder: Path) -> tuple[type, type]:
    """Returns upstream's classes of the model and of its processor."""
    require((folder / "src").is_dir(), f"{folder} has no src; expected upstream's repository")
    found = importlib.util.find_spec("transformers")
    require(found, "transformers is missing; expected upstream's environment")
    if importlib.util.find_spec("torchaudio") is None:
        # Upstream imports it, but uses it to read files alone.
        module = types.ModuleType("torchaudio")
        module.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
        sys.modules["torchaudio"] = module
    sys.path.insert(0, str(folder))
    model = importlib.import_module("src.modeling_moss_audio").MossAudioModel
    return model, importlib.import_module("src.processing_moss_audio").MossAudioProcessor


class Recorder:
    """Stages of one pass, caught where they enter or leave upstream's modules. The encoder's keep
    the padding of their chunks."""

    def __init__(self, model: nn.Module):
        self.rows = {}  # stage -> chunks, of all batches of them, or what is alone along that axis
        self.hooks = []
        encoder = model.audio_encoder
        decoder = model.language_model
        self.output(encoder.gelu, "encoder.conv1", "encoder.conv2", "encoder.conv3")
        self.input(encoder.layers[0], "encoder.stem")
        for i, layer in enumerate(encoder.layers):
            self.output(layer, f"encoder.layers.{i}")
        self.output(encoder, "encoder")
        self.output(model.audio_adapter, "adapter")
        for k, merger in enumerate(model.deepstack_audio_merger_list):
            self.output(merger, f"deepstack.{k}")
        # What leaves a decoder layer, its DeepStack rows included, is what enters the next module.
        names = ["inputs_embeds", *[f"decoder.layers.{i}" for i in range(len(decoder.layers))]]
        for name, module in zip(names, [*decoder.layers, decoder.norm]):
            self.input(module, name)
        self.output(decoder.norm, "final_norm")

    def keep(self, name: str, x: Tensor) -> None:
        self.rows.setdefault(name, []).extend(x.clone())

    def output(self, module: nn.Module, *names: str) -> None:
        """Records a module's output. Several names take turns, call by call."""
        turns = itertools.cycle(names)

        def hook(module, inputs, output) -> None:
            self.keep(next(turns), output if isinstance(output, Tensor) else output[0])

        self.hooks.append(module.register_forward_hook(hook))

    def input(self, module: nn.Module, name: str) -> None:
        def hook(module, inputs) -> None:
            self.keep(name, inputs[0])

        self.hooks.append(module.register_forward_pre_hook(hook))

    def stages(self) -> dict[str, Tensor]:
        """Returns the stages, and records no more."""
        for hook in self.hooks:
            hook.remove()
        return {name: pad_sequence(rows, batch_first=True) for name, rows in self.rows.items()}


@torch.no_grad()
def run_upstream(reference: Path, upstream: Path, folder: Path, device: str) -> dict[str, Tensor]:
    """Returns upstream's stages and ids of the run that a reference was dumped from."""
    with safe_open(reference, "pt") as file:
        metadata = file.metadata() or {}
        known = metadata.get("format") == "moss-min parity"
        require(known, f"{reference} is not what `parity.py dump` writes; expected that")
        clips = len(json.loads(metadata["sounds"]))
        stages = {f"waveform.{i}": file.get_tensor(f"waveform.{i}") for i in range(clips)}
        count = len(file.get_tensor("generated")) if "generated" in set(file.keys()) else 0
    model_class, processor_class = load_upstream(upstream)
    config = read_config(folder).adapter
    special = ("audio_token_id", "audio_start_id", "audio_end_id", "enable_time_marker")
    options = {name: getattr(config, name) for name in special}
    if metadata["time_markers"] != "null":
        options["enable_time_marker"] = json.loads(metadata["time_markers"])
    processor = processor_class.from_pretrained(folder, **options)
    model = model_class.from_pretrained(folder, dtype=DTYPES[metadata["dtype"]]).to(device).eval()

    inputs = processor(text=metadata["prompt"], audios=[x.numpy() for x in stages.values()])
    inputs = inputs.to(device)
    if clips:
        for i, frames in enumerate(inputs["audio_data_seqlens"].tolist()):
            stages[f"mel.{i}"] = inputs["audio_data"][i, :, :frames]
        inputs["audio_data"] = inputs["audio_data"].to(model.dtype)
        inputs["audio_input_mask"] = inputs["input_ids"] == config.audio_token_id
    recorder = Recorder(model)
    logits = model(**inputs).logits.float()
    stages |= recorder.stages() | {"input_ids": inputs["input_ids"].int(), "logits": logits}
    if count:
        options = {"max_new_tokens": count, "do_sample": False, "return_dict_in_generate": True}
        answer = model.generate(**inputs, **options, output_logits=True)
        stages["generated"] = answer.sequences[0, -len(answer.logits) :].int()
        stages["step_logits"] = torch.cat(answer.logits).float()
    return {name: x.cpu().contiguous() for name, x in stages.items()}


def run(argv: list[str] | None) -> None:
    parser = Parser("upstream.py", __doc__)
    add = parser.add_argument
    add("reference", metavar="REFERENCE", help="what parity.py dump wrote")
    add("--upstream", required=True, metavar="FOLDER", help="upstream's repository, with src in it")
    add("--model", required=True, metavar="FOLDER", help="checkpoint folder")
    add("-o", "--out", required=True, metavar="FILE", help="upstream's stages, a .safetensors")
    add("--device", default="cpu", metavar="D", help="cpu (the default) or cuda")
    args = parser.parse_args(argv)
    folders = Path(args.upstream), Path(args.model)
    stages = run_upstream(Path(args.reference), *folders, args.device)
    write_tensors(stages, Path(args.out))
    print(f"{args.out}: {len(stages)} stages by upstream's code")


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return end("upstream.py", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
