"""tools/upstream.py: upstream's own code, recorded like a port, agrees with a dump.

It needs the environment variable UPSTREAM: a folder with OpenMOSS/MOSS-Audio's src in it, for
transformers 4.57.1."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from conftest import GOLDEN, HERE, golden_case, write_clip
from moss_min import TINY
from test_parity import CHECKPOINT, VARIANT, run

UPSTREAM = os.environ.get("UPSTREAM")
IS_READY = UPSTREAM and importlib.util.find_spec("transformers")
TOOL = HERE.parent / "tools" / "upstream.py"
# A checkpoint, a golden case whose prompt is taken, and options of the dump.
RUNS = {
    "golden": (CHECKPOINT, "three_chunks", []),
    "two clips": (CHECKPOINT, "two_audios", []),
    "no markers": (CHECKPOINT, "short", ["--no-time-markers"]),
    "text": (CHECKPOINT, "text_only", []),
    "variant": (VARIANT, "variant", []),
    "tiny": (TINY, "three_chunks", []),
}


@pytest.mark.slow
@pytest.mark.skipif(not IS_READY, reason="needs upstream")
@pytest.mark.parametrize("name", RUNS)
def test_upstreams_stages_and_ids_are_the_dumps(name, tmp_path):
    folder, case, options = RUNS[name]
    waves = golden_case(case).clips
    clips = [write_clip(tmp_path / f"{i}.wav", wave) for i, wave in enumerate(waves)]
    reference = tmp_path / "reference.safetensors"
    port = tmp_path / "port.safetensors"
    question = ["--prompt", golden_case(case).text, "--max-new-tokens", 12, *options]
    assert run("dump", *clips, "-o", reference, "--model", folder, *question).status == 0
    model = ["--model", folder]
    subprocess.run(
        [sys.executable, TOOL, reference, "--upstream", UPSTREAM, *model, "-o", port], check=True
    )
    answer = run("compare", reference, port, *model, "--json").answer
    assert answer["equal"]
    # All that there are: 22 or more with sound, and embeddings, layers, norm and logits without.
    assert len(answer["stages"]) >= (22 if clips else 8)
    assert max(row["max_rel"] for row in answer["stages"]) <= 3e-6
    assert torch.equal(load_file(port)["generated"], load_file(reference)["generated"])


def test_what_is_not_upstreams_repository_is_one_line_and_status_2(tmp_path, capfd):
    reference = tmp_path / "reference.safetensors"
    run("dump", "--prompt", "Hi", "-o", reference, "--model", TINY)
    command = [sys.executable, TOOL, reference, "--upstream", GOLDEN, "--model", TINY, "-o", "x"]
    assert subprocess.run(command).returncode == 2
    assert f"upstream: {GOLDEN} has no src" in capfd.readouterr().err
