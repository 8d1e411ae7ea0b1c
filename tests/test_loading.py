"""How much memory loading takes, in processes of its own; `pytest -s --slow` shows the figures."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from conftest import GOLDEN, edit_json, needs_proc, numbers_from
from moss_min import MossAudio, load_tokenizer, read_config

LOAD = """
import sys
from pathlib import Path
import torch
from safetensors import safe_open
from moss_min import MossAudio
from test_loading import anonymous_memory

small, folder, dtype = sys.argv[1:]
MossAudio.from_pretrained(small, "cpu", dtype)  # so that libraries are there before it counts
before = anonymous_memory()
seen = []

def look(name, tensor):
    seen.append(anonymous_memory())
    return tensor

loaded = dict(MossAudio.from_pretrained(folder, "cpu", dtype, change=look).named_parameters())
peak = max(*seen, anonymous_memory()) - before
weights = sum(parameter.nbytes for parameter in loaded.values())
wrong = 0
for shard in sorted(Path(folder).glob("*.safetensors")):
    with safe_open(shard, "pt") as file:
        for name in file.keys():
            stored = file.get_tensor(name).to(getattr(torch, dtype))
            wrong += not torch.equal(loaded.pop(name), stored)
print(peak, weights, wrong + len(loaded))
"""


def anonymous_memory() -> int:
    """The bytes of this process's own memory, mapped files' pages not counted."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", status)[1])


def large_checkpoint(folder: Path, vocabulary: int, layers: int) -> Path:
    """Random bfloat16 weights in four shards, in the released layout."""
    shutil.copytree(GOLDEN / "checkpoint", folder, ignore=shutil.ignore_patterns("model*"))
    sizes = {
        "language_config.vocab_size": vocabulary,
        "language_config.hidden_size": 1024,
        "language_config.intermediate_size": 4096,
        "language_config.num_hidden_layers": layers,
    }
    edit_json(folder / "config.json", **sizes)
    with torch.device("meta"):
        model = MossAudio(read_config(folder), load_tokenizer(folder))
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    rng = np.random.default_rng(0)
    weight_map = {}
    for i in range(4):
        shard = f"model-{i + 1:05}-of-00004.safetensors"
        tensors = {}
        for name in list(shapes)[i * len(shapes) // 4 : (i + 1) * len(shapes) // 4]:
            bits = np.frombuffer(rng.bytes(2 * shapes[name].numel()), np.uint16)
            # bfloat16 numbers from 0.5 to 2, of both signs.
            numbers = torch.from_numpy(bits & 0x80FF | 0x3F00).view(torch.bfloat16)
            tensors[name] = numbers.view(shapes[name])
        save_file(tensors, folder / shard)
        weight_map |= dict.fromkeys(tensors, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.slow
@needs_proc
@pytest.mark.parametrize("dtype, least, most", [("bfloat16", -0.1, 0.1), ("float32", 0.9, 1.1)])
@pytest.mark.parametrize(
    "vocabulary, layers", [(20_000, 2), pytest.param(151_936, 16, marks=pytest.mark.slow)]
)
def test_no_second_copy_of_the_weights_is_ever_in_memory(
    vocabulary, layers, dtype, least, most, tmp_path
):
    """Of a file in the model's own type there is not even a first one: it is mapped."""
    folder = large_checkpoint(tmp_path / "large", vocabulary, layers)
    peak, weights, wrong = numbers_from(LOAD, GOLDEN / "checkpoint", folder, dtype)
    shutil.rmtree(folder)
    print(f"\n{dtype}: {weights / 1e9:.2f} GB of weights, {peak / weights:.3f} times that at most")
    assert wrong == 0
    assert least < peak / weights < most
