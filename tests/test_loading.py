"""How much memory loading takes: a checkpoint of 1 GB, in processes of their own. `pytest -s` shows the figures."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from conftest import GOLDEN, HERE, edit_json
from moss_min import MossAudio, load_tokenizer, read_config

LOAD = """
import json, re, sys
from pathlib import Path
import torch
from safetensors import safe_open
from moss_min import MossAudio

def high_water():  # resource's ru_maxrss begins at that of the process which started this one
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

small, folder, dtype = sys.argv[1:]
MossAudio.from_pretrained(small, "cpu", dtype)  # so that libraries and buffers are there before it counts
before = high_water()
model = MossAudio.from_pretrained(folder, "cpu", dtype)
peak = high_water() - before
loaded = dict(model.named_parameters())
wrong = []
for shard in sorted(Path(folder).glob("*.safetensors")):
    with safe_open(shard, "pt") as file:
        for name in file.keys():
            if not torch.equal(loaded.pop(name), file.get_tensor(name).to(getattr(torch, dtype))):
                wrong.append(name)
weights = sum(parameter.nbytes for parameter in model.parameters())
print(json.dumps({"peak": peak, "weights": weights, "wrong": wrong, "not in a shard": list(loaded)}))
"""


@pytest.fixture(scope="module")
def large_checkpoint(tmp_path_factory):
    """1.0 GB in bfloat16 and four shards, in the released layout."""
    folder = tmp_path_factory.mktemp("large") / "checkpoint"
    shutil.copytree(GOLDEN / "checkpoint", folder, ignore=shutil.ignore_patterns("model*"))
    sizes = {
        "vocab_size": 151_936,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 16,
    }
    edit_json(
        folder / "config.json", **{f"language_config.{name}": size for name, size in sizes.items()}
    )
    with torch.device("meta"):
        tensors = MossAudio(read_config(folder), load_tokenizer(folder)).state_dict()
    shapes, rng, weight_map = (
        {name: tensor.shape for name, tensor in tensors.items()},
        np.random.default_rng(0),
        {},
    )
    for i in range(4):
        shard = f"model-{i + 1:05}-of-00004.safetensors"
        tensors = {}
        for name in list(shapes)[i * len(shapes) // 4 : (i + 1) * len(shapes) // 4]:
            bits = np.frombuffer(rng.bytes(2 * shapes[name].numel()), np.uint16)
            numbers = torch.from_numpy(
                bits & 0x80FF | 0x3F00
            )  # bfloat16 from 0.5 to 2, of both signs
            tensors[name] = numbers.view(torch.bfloat16).view(shapes[name])
        save_file(tensors, folder / shard)
        weight_map |= dict.fromkeys(tensors, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    yield folder
    shutil.rmtree(folder)


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="a process's high-water mark is read from /proc"
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_loading_peaks_within_10_percent_of_the_weights_and_every_weight_is_the_files(
    dtype, large_checkpoint
):
    command = [sys.executable, "-c", LOAD, GOLDEN / "checkpoint", large_checkpoint, dtype]
    found = json.loads(
        subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True, check=True).stdout
    )
    weights, ratio = found["weights"], found["peak"] / found["weights"]
    print(f"\n{dtype}: {weights / 1e9:.2f} GB of weights, at the peak {ratio:.3f} times that")
    assert found["wrong"] == found["not in a shard"] == []
    assert weights > 1e9 and 0.9 < ratio < 1.1
