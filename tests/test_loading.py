"""How much memory loading takes, in processes of its own."""

import re
import shutil
from pathlib import Path

import pytest
import torch

from conftest import GOLDEN, needs_proc, numbers_from
from test_configurations import random_checkpoint

LOAD = """
import sys
from moss_min import MossAudio
from test_loading import anonymous_memory

small, folder, dtype = sys.argv[1:]
MossAudio.from_pretrained(small, "cpu", dtype)  # so that libraries are there before it counts
before = anonymous_memory()
seen = []

def look(name, tensor):
    seen.append(anonymous_memory())
    return tensor

loaded = MossAudio.from_pretrained(folder, "cpu", dtype, change=look)
peak = max(*seen, anonymous_memory()) - before
print(peak, sum(parameter.nbytes for parameter in loaded.parameters()))
"""


def anonymous_memory() -> int:
    """The bytes of this process's own memory, mapped files' pages not counted."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", status)[1])


@pytest.mark.slow
@needs_proc
@pytest.mark.parametrize("dtype, least, most", [("bfloat16", -0.1, 0.1), ("float32", 0.9, 1.1)])
@pytest.mark.parametrize("vocabulary, layers", [(20_000, 2), (151_936, 16)])
def test_no_second_copy_of_the_weights_is_ever_in_memory(
    vocabulary, layers, dtype, least, most, tmp_path
):
    """Of a file in the model's own type there is not even a first one: it is mapped."""
    sizes = {
        "language_config.vocab_size": vocabulary,
        "language_config.hidden_size": 1024,
        "language_config.intermediate_size": 4096,
        "language_config.num_hidden_layers": layers,
    }
    folder = random_checkpoint(tmp_path / "large", torch.bfloat16, shards=4, **sizes)
    peak, weights = numbers_from(LOAD, GOLDEN / "checkpoint", folder, dtype)
    shutil.rmtree(folder)
    assert least < peak / weights < most
