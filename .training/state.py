"""state.py pack STATE FILE: a state's weights as float16; of one that ends the encoder's stage, encoder and heads alone.
state.py unpack FILE STATE: a state to go on from (seed 0), for OUT/training/state.safetensors; the optimizers begin anew."""
from pathlib import Path
import json, sys, tempfile
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
command, source, out = sys.argv[1:]
with safe_open(source, "pt") as file:
    run = file.metadata()["run"]
tensors = load_file(source)
if command == "pack":
    kept = ("0.", "1.") if json.loads(run)["stage"] else ("0.audio_encoder.", "1.")
    save_file({k: v.half() for k, v in tensors.items() if k.startswith(kept)}, out, {"run": run})
else:
    import make_tiny
    folder = Path(tempfile.mkdtemp()) / "folder"
    make_tiny.write_folder(folder, True, True)
    model = make_tiny.random_model(folder, 0)
    whole = {f"0.{k}": v.float().clone() for k, v in model.state_dict().items()}
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    save_file(whole | {k: v.float() for k, v in tensors.items()}, out, {"run": run})
