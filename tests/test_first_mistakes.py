"""What goes wrong first for a new user, and how it is answered.

More of the same is in test_bad_input.py, and a film without sound in test_sound.py."""

import ast
import fnmatch
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

import batch
import bench
import evaluate
import make_tiny
import mistakes
import moss_min
import parity
import train
import upstream
from conftest import FOLDER, HERE, JFK, golden_model
from moss_min import TINY, MossAudio

ROOT = HERE.parent
END = 302  # the golden checkpoint's stop id
DOCUMENTS = [ROOT / name for name in ("README.md", "tools/README.md", "tiny/README.md")]


def read_document(path: Path) -> str:
    """A page's text, each command on one line."""
    return path.read_text("utf-8").replace("\\\n", "")


# ---- installing ----


def test_on_python_3_9_pip_refuses_before_it_fetches_torch():
    lines = (ROOT / "requirements.txt").read_text("utf-8").splitlines()
    first, *others = [Requirement(line) for line in lines if not line.startswith("#")]
    assert first.marker.evaluate({"python_version": "3.9"})
    assert not first.marker.evaluate({"python_version": "3.10"})
    # numpy 2.0.2 is the last for Python 3.9.
    assert first.name == "numpy" and not first.specifier.contains("2.0.2")
    assert "torch" in [other.name for other in others]


def test_on_python_3_9_moss_min_says_so_before_it_imports_torch(monkeypatch):
    source = Path(moss_min.__file__).read_text("utf-8")
    ast.parse(source, feature_version=(3, 9))
    monkeypatch.setattr(sys, "version_info", (3, 9, 18))
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit, match="expected Python 3.10 or newer"):
        exec(compile(source, "moss_min.py", "exec"), {"__name__": "moss_min"})


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.parent.name)
def test_git_ignores_what_the_commands_of_the_documents_write(path):
    text = read_document(path)
    written = re.findall(r"(?:-o|--out|--local-dir) (\S+)", text)
    written += re.findall(r"soundfile\.write\('(\S+?)'", text)
    written += re.findall(r"make_tiny\.py (?:bank|words|train BANK) (\S+)", text)
    assert len(written) > 0
    patterns = (ROOT / ".gitignore").read_text("utf-8").splitlines()
    for name in written:
        top = Path(name).parts[0]
        assert any(fnmatch.fnmatch(top, pattern.strip("/")) for pattern in patterns), name


# ---- a checkpoint ----


def test_a_hubs_name_as_model_is_to_be_downloaded_first(complaint):
    name = "OpenMOSS-Team/MOSS-Audio-4B-Instruct"
    command = f"hf download {name} --local-dir MOSS-Audio-4B-Instruct"
    assert f"download it first: {command}" in complaint("--model", name, "--prompt", "Hi")


def test_a_folder_of_git_lfs_pointers_is_recognised(checkpoint, complaint):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4967215360\n"
    for path in [*checkpoint.glob("*.safetensors"), checkpoint / "tokenizer.json"]:
        path.write_text(pointer)
    line = complaint("--model", checkpoint, "--prompt", "Hi")
    assert "a Git-LFS pointer" in line and "git lfs pull" in line


@pytest.mark.parametrize("dtype", [torch.bfloat16, "torch.bfloat16", "bfloat16"], ids=repr)
def test_a_dtype_may_be_torchs_own(dtype):
    model = MossAudio.from_pretrained(FOLDER, "cpu", dtype)
    assert model.lm_head.weight.dtype == torch.bfloat16


# ---- a sound ----


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "speech.wav: No such file"),
        (b"", "speech.wav: an empty file; expected a sound"),
    ],
)
def test_a_file_that_is_no_sound_is_named_in_a_sentence(content, words, tmp_path, complaint):
    path = tmp_path / "speech.wav"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=words):
        golden_model().ask([JFK, path], "Transcribe the audio.")
    assert words in complaint(JFK, path, "--model", FOLDER)


def test_none_in_place_of_a_sound_is_named_in_a_sentence():
    with pytest.raises(ValueError, match="^no sound, but None; expected a sound file"):
        golden_model().ask(None, "Transcribe the audio.")


# ---- the answer ----


def test_a_batch_marks_the_answers_that_are_cut_and_no_other(tmp_path):
    lines = [
        {"audio": str(TINY / "bell.wav"), "prompt": prompt}
        for prompt in ("Describe this audio.", "Hi")
    ]
    manifest = tmp_path / "in.jsonl"
    manifest.write_text("\n".join(map(json.dumps, lines)), "utf-8")
    files = ["--manifest", str(manifest), "--out", str(tmp_path / "out.jsonl")]

    def is_cut(*options) -> list[bool]:
        (tmp_path / "out.jsonl").unlink(missing_ok=True)
        assert batch.main([*files, "--device", "cpu", "--greedy", *options]) == 0
        answers = (tmp_path / "out.jsonl").read_text("utf-8").splitlines()
        return [json.loads(answer).get("cut", False) for answer in answers]

    assert is_cut("--max-new-tokens", "2") == [True, True]
    assert is_cut() == [False, False]


@pytest.mark.parametrize(
    ("argv", "temperature"),
    [
        ([], 0),
        (["--seed", "1"], 1),
        (["--temperature", "0.7"], 0.7),
        (["--prompt", "Hi"], 1),
        ([str(TINY / "bell.wav")], 1),
    ],
)
def test_the_demonstration_alone_is_greedy_unasked(argv, temperature, monkeypatch, capsys):
    given = []

    def generate(model, prompt, **options):
        given.append(options["temperature"])
        return iter([END])

    monkeypatch.setattr(MossAudio, "generate", generate)
    assert moss_min.main(["--device", "cpu", *argv]) == 0
    assert given == [temperature]


@pytest.mark.parametrize(
    "text",
    [*map(read_document, DOCUMENTS[:2]), moss_min.DESCRIPTION, batch.__doc__],
    ids=["README", "tools", "moss_min", "batch"],
)
def test_every_command_and_call_that_the_documents_show_is_greedy(text):
    commands = re.findall(r"^ *python (?:tools/batch|moss_min)\.py .*", text, re.MULTILINE)
    calls = re.findall(r".*(?:model\.ask|model\.generate|generate_batch)\(.*", text)
    assert len(commands) > 0
    assert [command for command in commands if "--greedy" not in command] == []
    assert [call for call in calls if "temperature=0" not in call] == []


# ---- the programs ----

PROGRAMS = [moss_min, batch, bench, evaluate, make_tiny, mistakes, parity, train, upstream]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_the_help_of_a_program_begins_with_a_sentence_and_an_example(program, capsys):
    with pytest.raises(SystemExit):
        program.main(["--help"])
    sentence, empty, example = capsys.readouterr().out.splitlines()[:3]
    assert sentence.endswith(".") and empty == "" and example.startswith("    python ")


@pytest.mark.slow
def test_tools_write_utf_8_in_a_locale_without_it(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "你好", "id": "问"}', "utf-8")
    program = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); import batch, common; from pathlib "
        "import Path; common.write_text('\\u4f60', Path('text')); sys.exit(batch.main())"
    )
    files = ["--manifest", "in.jsonl", "--out", "out.jsonl", "--model", FOLDER]
    options = ["--device", "cpu", "--greedy", "--max-new-tokens", "4"]
    command = [sys.executable, "-c", program, ROOT / "tools", *files, *options]
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0"}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "text").read_bytes().decode("utf-8") == "你"
    answer = json.loads((tmp_path / "out.jsonl").read_bytes().decode("utf-8"))
    assert answer["id"] == "问" and "error" not in answer
