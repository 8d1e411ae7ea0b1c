"""encoder.py pack STATE FILE: of a state after the encoder's stage, encoder and heads as float16.
encoder.py unpack FILE STATE: a state to go on from (seed 0), for OUT/training/state.safetensors of each run."""
from pathlib import Path
import json, sys
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
command, source, out = sys.argv[1:]
if command == "pack":
    with safe_open(source, "pt") as file:
        run = json.loads(file.metadata()["run"])
        kept = {k: file.get_tensor(k) for k in file.keys() if k.startswith(("0.audio_encoder.", "1."))}
    assert run["step"] == 8000 and run["stage"] == 0, run
    save_file({k: v.half() if v.is_floating_point() else v for k, v in kept.items()}, out, {"run": json.dumps(run)})
else:
    import tempfile, make_tiny
    with safe_open(source, "pt") as file:
        run = file.metadata()["run"]
    folder = Path(tempfile.mkdtemp()) / "folder"
    make_tiny.write_folder(folder, True, True)
    model = make_tiny.random_model(folder, 0)
    tensors = {f"0.{k}": v.float().clone() for k, v in model.state_dict().items()}
    tensors |= {k: v.float() for k, v in load_file(source).items()}
    save_file(tensors, out, {"run": run})
