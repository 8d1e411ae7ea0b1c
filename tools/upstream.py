"""Writes what upstream's own code computes, in the format of a port.

    python tools/upstream.py reference.safetensors --upstream MOSS-Audio --model FOLDER -o FILE

It repeats the run that `parity.py dump` has written: the same sound, prompt and dtype. Run it where
upstream's repository runs (transformers), then compare FILE like a port's. MOSS-Audio is a clone of
https://github.com/OpenMOSS/MOSS-Audio.
"""

import importlib.machinery
import importlib.util
import itertools
import sys
import types
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import write_tensors
from encoder import require
from moss_min import DTYPES, Parser, end, read_config
from parity import read_reference


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


def record(model: nn.Module) -> dict[str, list[Tensor]]:
    """Returns what the model's next pass fills: for each stage, caught where it enters or leaves
    upstream's modules, its chunks of all calls, or what is alone along that axis."""
    caught = {}

    def catch_output(module: nn.Module, *names: str) -> None:
        turns = itertools.cycle(names)  # several names take turns, call by call

        def hook(module, inputs, output) -> None:
            x = output if isinstance(output, Tensor) else output[0]
            caught.setdefault(next(turns), []).extend(x.clone())

        module.register_forward_hook(hook)

    def catch_input(module: nn.Module, name: str) -> None:
        def hook(module, inputs) -> None:
            caught.setdefault(name, []).extend(inputs[0].clone())

        module.register_forward_pre_hook(hook)

    encoder = model.audio_encoder
    decoder = model.language_model
    catch_output(encoder.gelu, "encoder.conv1", "encoder.conv2", "encoder.conv3")
    catch_input(encoder.layers[0], "encoder.stem")
    for i, layer in enumerate(encoder.layers):
        catch_output(layer, f"encoder.layers.{i}")
    catch_output(encoder, "encoder")
    catch_output(model.audio_adapter, "adapter")
    for k, merger in enumerate(model.deepstack_audio_merger_list):
        catch_output(merger, f"deepstack.{k}")
    # What leaves a decoder layer, its DeepStack rows included, is what enters the next module.
    names = ["inputs_embeds", *[f"decoder.layers.{i}" for i in range(len(decoder.layers))]]
    for name, module in zip(names, [*decoder.layers, decoder.norm]):
        catch_input(module, name)
    catch_output(decoder.norm, "final_norm")
    return caught


@torch.no_grad()
def run_upstream(reference: Path, upstream: Path, folder: Path, device: str) -> dict[str, Tensor]:
    """Returns upstream's stages and ids of the run that a reference was dumped from."""
    given = read_reference(reference)
    metadata = given.metadata
    stages = {name: x for name, x in given.tensors.items() if name.startswith("waveform.")}
    waves = [x.numpy() for x in stages.values()]
    model_class, processor_class = load_upstream(upstream)
    config = read_config(folder).adapter
    special = ("audio_token_id", "audio_start_id", "audio_end_id", "enable_time_marker")
    options = {name: getattr(config, name) for name in special}
    if metadata["time_markers"] is not None:
        options["enable_time_marker"] = metadata["time_markers"]
    processor = processor_class.from_pretrained(folder, **options)
    model = model_class.from_pretrained(folder, dtype=DTYPES[metadata["dtype"]]).to(device).eval()

    inputs = processor(text=metadata["prompt"], audios=waves).to(device)
    stages["input_ids"] = inputs["input_ids"].int()
    if waves:
        for i, frames in enumerate(inputs["audio_data_seqlens"].tolist()):
            stages[f"mel.{i}"] = inputs["audio_data"][i, :, :frames]
        inputs["audio_data"] = inputs["audio_data"].to(model.dtype)
        inputs["audio_input_mask"] = inputs["input_ids"] == config.audio_token_id
    if "generated" in given.tensors:
        most = {"max_new_tokens": len(given.tensors["generated"]), "do_sample": False}
        answer = model.generate(**inputs, **most, return_dict_in_generate=True, output_logits=True)
        stages["generated"] = answer.sequences[0, -len(answer.logits) :].int()
        stages["step_logits"] = torch.cat(answer.logits).float()
    caught = record(model)
    stages["logits"] = model(**inputs).logits.float()
    for name, rows in caught.items():
        stages[name] = pad_sequence(rows, batch_first=True)
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
    return end("upstream", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
