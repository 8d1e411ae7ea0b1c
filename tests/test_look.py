"""tools/look.py: what a page says is what the model does, and a browser shows it."""

import base64
import functools
import html.parser
import json
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch

import look
import stages
from conftest import golden_case, golden_model, golden_prompt, largest_error, noise, write_clip
from moss_min import TINY, MossAudio, load_audio

ROOT = Path(__file__).resolve().parents[1]
CLIP = TINY / "meters.wav"
HOSTILE = "</script><script>alert(1)</script> \"quoted\" & 'so' <b>\U0001f514 שלום"


@functools.cache
def tiny() -> MossAudio:
    return MossAudio.from_pretrained(TINY, device="cpu")


@functools.cache
def gathered() -> dict:
    return look.gather(tiny(), [CLIP], look.ASK)


@functools.cache
def known_page() -> str:
    return look.page(tiny(), [CLIP], look.ASK, names=["meters.wav"], source="https://a.example/b")


def block(page: str) -> dict:
    """The page's JSON."""
    return json.loads(re.search(r'application/json">(.*?)</script>', page, re.DOTALL)[1])


def text_of(run: dict) -> str:
    return "".join(run["pieces"])


# ---- what is gathered ----


def test_weights_that_are_computed_again_give_sdpas_output():
    model = golden_model()
    errors = []
    outputs = []

    def compare(attention, args, output):
        x, cache = args
        weights = look.weights(attention, x, cache, torch.ones(x.shape[1], dtype=torch.bool))
        values = cache.values[attention.layer][0, :, : cache.in_use]  # [G, K, hd]
        values = values.repeat_interleave(len(weights) // len(values), dim=0)
        mixed = (weights @ values).transpose(0, 1).flatten(1)  # [n, H x hd]
        errors.append(largest_error(mixed, outputs.pop()))

    hooks = []
    for layer in model.language_model.layers:
        o_proj = layer.self_attn.o_proj  # it takes SDPA's output
        hooks.append(o_proj.register_forward_pre_hook(lambda _, args: outputs.append(args[0][0])))
        hooks.append(layer.self_attn.register_forward_hook(compare))
    list(model.generate(golden_prompt("long"), 2, 0))  # two slices of a prompt, and a step
    for hook in hooks:
        hook.remove()
    assert len(errors) == 3 * len(model.language_model.layers)
    assert max(errors) <= 1e-5


def test_deepstack_is_measured_as_in_upstreams_stages():
    case = golden_case("three_chunks").tensors
    run = look.see(golden_model(), golden_prompt("three_chunks"), answer=[7])
    heard = [kind == look.SOUND for kind in run["kinds"]]
    for k, ratios in enumerate(run["added"]):
        rows = case[f"deepstack.{k}"]
        before = case[f"decoder.layers.{k}"][heard] - rows
        expected = rows.norm(dim=1) / before.norm(dim=1)
        torch.testing.assert_close(torch.tensor(ratios), expected, rtol=1e-4, atol=1e-5)


def test_the_run_is_the_models_own_greedy_answer_and_its_probabilities():
    run = gathered()["runs"]["whole"]
    prompt = tiny().prompt(look.ASK, [CLIP])
    answer = list(tiny().generate(prompt, temperature=0))
    assert [token["id"] for token in run["tokens"]] == answer
    both = prompt._replace(ids=torch.cat([prompt.ids, torch.tensor(answer[:-1])]))
    said = tiny()(both)[len(prompt.ids) - 1 :].softmax(-1)  # [n, V]
    for token, expected in zip(run["tokens"], said):
        ids, shares = zip(*token["rivals"])
        torch.testing.assert_close(torch.tensor(shares), expected[list(ids)], rtol=0, atol=1e-4)
        assert shares[0] == pytest.approx(float(expected.max()), abs=1e-4)
        assert token["layers"][-1][0] == ids[0]  # the last layer says what the model says


def test_a_given_answer_is_followed_and_the_page_says_so():
    given = tiny().tokenizer.encode("yes").ids
    data = look.gather(tiny(), [CLIP], look.ASK, answer=given)
    assert [token["id"] for token in data["runs"]["whole"]["tokens"]] == given
    assert text_of(data["runs"]["no-markers"]) == text_of(gathered()["runs"]["no-markers"])
    assert any("was given" in note for note in data["notes"])


def test_without_deepstack_the_answer_begins_as_the_stages_without_it_say():
    wave = load_audio(CLIP)
    bare = stages.Run(tiny(), look.ASK, True, 1)
    bare.merger_of_layer = {}
    logits = dict(stages.compute(bare, {"waveform.0": wave}))["logits"][-1]
    token = gathered()["runs"]["no-deepstack"]["tokens"][0]
    assert token["rivals"][0][0] == int(logits.argmax())
    assert token["rivals"][0][1] == pytest.approx(float(logits.softmax(-1).max()), abs=1e-4)
    assert not any(map(any, gathered()["runs"]["no-deepstack"]["added"]))


def test_attention_goes_to_text_markers_sound_and_answer_and_to_nothing_else():
    for run in gathered()["runs"].values():
        stored = (run["attention"].double() / 255) ** 2  # [n, L, H, C + 4]
        columns, shares = stored[..., :-4], stored[..., -4:]
        kinds = torch.tensor(run["kinds"])
        for kind in (look.TEXT, look.MARKER, look.SOUND):
            summed = columns[..., kinds == kind].sum(-1)
            torch.testing.assert_close(summed, shares[..., kind], rtol=0, atol=0.02)
        torch.testing.assert_close(
            shares.sum(-1), torch.ones(shares.shape[:-1]).double(), atol=0.01, rtol=0
        )
        assert shares[0, ..., look.ANSWER].max() == 0 < shares[-1, ..., look.ANSWER].min()


def test_a_marker_of_two_digits_is_two_tokens_after_125_audio_tokens():
    prompt = tiny().prompt("Hm.", [noise(16_000 * 10)])
    kinds = look.see(tiny(), prompt, answer=[1])["kinds"]
    sound = [i for i, kind in enumerate(kinds) if kind == look.SOUND]
    assert kinds[sound[0] : sound[-1] + 4] == 5 * ([2] * 25 + [1]) + [1, 0]
    assert kinds.count(look.MARKER) == 6


def test_two_clips_lie_one_after_the_other_with_their_padding():
    first, second = look.layout([50, 620], 200)
    assert first["end"] == 50 and first["padded"] == 400 == second["start"]
    assert first["tokens"] == [0, 8, 16, 24, 32, 40, 48]
    assert second["chunks"] == [400, 800] and second["end"] == 1020 and second["padded"] == 1200
    assert len(second["tokens"]) == 50 + 28


def test_words_lie_between_their_timestamps_and_times_that_fall_go_to_the_next_clip():
    clips = look.layout([200, 200], 200)
    pieces = ["[0", ".5]", "go", "od", "[0.75]", "[1.0]", " up ", "[1.2]", "[0.1]on[0.2]"]
    good, up, on = look.words_of(pieces, clips)
    assert good == {"text": "good", "times": [50, 75], "tokens": [2, 3]}
    assert up == {"text": "up", "times": [100, 120], "tokens": [6, 6]}
    assert on == {"text": "on", "times": [210, 220], "tokens": [8, 8]}


def test_a_character_of_several_tokens_comes_with_its_last():
    tokenizer = golden_model().tokenizer
    ids = tokenizer.encode("a\U0001f514b").ids
    pieces = look.pieces_of(tokenizer, ids)
    assert pieces == ["a", "", "", "", "\U0001f514", "b"][: len(ids) - 1] + ["b"]


def test_long_sound_is_averaged_and_the_page_says_so(monkeypatch):
    for name, value in {"MOST_COLUMNS": 40, "MOST_FRAMES": 100, "MOST_SAMPLES": 1000}.items():
        monkeypatch.setattr(look, name, value)
    monkeypatch.setattr(look, "HEADS_BYTES", 0)
    monkeypatch.setattr(look, "MOST_TOKENS", 5)
    data = block(look.page(tiny(), [CLIP], look.ASK))
    run = data["runs"]["whole"]
    frames = data["clips"][0]["padded"]
    assert run["shape"] == [5, 4, 1, -(-len(run["ids"]) // run["pool"]) + 4] and run["pool"] == 2
    assert len(zlib.decompress(base64.b64decode(data["mel"]))) == 128 * -(-frames // 3)
    assert len(zlib.decompress(base64.b64decode(data["sound"]))) == 44 + 2 * 1000
    assert len(data["notes"]) == 6


def test_nothing_in_a_page_ends_its_block_and_every_text_comes_back():
    page = look.page(tiny(), [CLIP], HOSTILE, names=[HOSTILE])
    assert page.count("</script>") == known_page().count("</script>") == 2
    assert block(page)["prompt"] == HOSTILE and block(page)["clip_names"] == [HOSTILE]


def test_each_panel_names_a_function_that_its_file_has():
    named = re.findall(r'data-file="(\w+\.py)">([\w.]+)<', look.TEMPLATE.read_text())
    assert len(named) == 6
    for file, name in named:
        *owner, function = name.split(".")
        code = (ROOT / file).read_text()
        assert f"def {function}(" in code and all(f"class {one}(" in code for one in owner)


# ---- the command line ----


@pytest.mark.slow
def test_twelve_seconds_take_at_most_two_and_a_half_megabytes(tmp_path):
    wave = torch.cat([load_audio(TINY / f"{name}.wav") for name in ("cards", "meters", "bell")])
    clip = write_clip(tmp_path / "clip.wav", wave[: 12 * 16_000])
    assert look.main([str(clip), "-o", str(tmp_path / "look.html"), "--device", "cpu"]) == 0
    assert (tmp_path / "look.html").stat().st_size < 2.5e6


@pytest.mark.slow
def test_a_picture_is_a_small_png(tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    assert look.main([str(CLIP), "--png", str(tmp_path / "look.png")]) == 0
    data = (tmp_path / "look.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) < 300_000
    assert not Path("look.html").exists()


def test_wrong_input_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    out = str(tmp_path / "no" / "look.html")
    for argv, said in [
        (["none.wav"], "none.wav"),
        ([str(CLIP), "--source", "javascript:alert(1)"], "expected an address"),
        ([str(CLIP), "-o", out], "No such file"),
        ([str(CLIP), "--png", "look.png"], "pip install matplotlib"),
    ]:
        assert look.main(argv) == 2
        assert said in capsys.readouterr().err.splitlines()[-1]


# ---- in a browser ----

CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")


class Texts(html.parser.HTMLParser):
    """The text of each element that has an id, and pressed buttons' texts."""

    def __init__(self, page: str):
        super().__init__()
        self.texts = {}
        self.open = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "br", "link"):
            self.open.append(dict(attributes).get("id"))

    def handle_endtag(self, tag):
        self.open.pop()

    def handle_data(self, data):
        for name in filter(None, self.open):
            self.texts[name] = self.texts.get(name, "") + data


def browse(page: str, folder: Path, fragment: str = "") -> dict[str, str]:
    """Opens a page from a file; returns its elements' texts once its script has run. Nothing may
    be said on the console or asked of the network."""
    (folder / "look.html").write_text(page)
    log = folder / "net.json"
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += [f"--user-data-dir={folder}/profile", f"--log-net-log={log}", "--dump-dom"]
    command += ["--virtual-time-budget=20000", f"file://{folder}/look.html#{fragment}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert "CONSOLE" not in done.stderr
    # The browser's own requests have no page that began them.
    lines = [line for line in log.read_text().split("\n") if '"initiator":"null"' in line]
    asked = [re.search('"url":"([^"]*)', line)[1] for line in lines]
    assert [url for url in asked if not url.startswith(("file:", "blob:"))] == []
    return Texts(done.stdout).texts


@needs_chromium
def test_a_linked_view_shows_the_words_and_where_its_token_looked(tmp_path):
    run = gathered()["runs"]["whole"]
    word = run["words"][1]
    first = word["tokens"][0]
    texts = browse(known_page(), tmp_path, f"token={first}&layer=2&head=1&run=whole")
    weights = (run["attention"][first, 2, 1].double() / 255) ** 2
    sound = [i for i, kind in enumerate(run["kinds"]) if kind == look.SOUND]
    peak = int(weights[sound].argmax())
    share = 100 * float(weights[sound[peak]])
    assert texts["which"] == f"{first} {run['pieces'][first]}"
    assert f"“{run['pieces'][first]}”" in texts["looked"]
    times = f"from {0.08 * peak:.2f} s to {0.08 * (peak + 1):.2f} s, audio token {peak + 1}"
    assert f"{times}: {share:.1f} % of its attention" in texts["looked"]
    assert texts["words"] == "".join(word["text"] for word in run["words"])
    assert texts["markers"] == "2"
    assert texts["before"].startswith("<|im_start|>system↵You·are·a·helpful")
    assert texts["clips"] == "meters.wav" and texts["asked"] == look.ASK
    for shown in gathered()["runs"].values():
        assert text_of(shown) in texts["runs"]


@needs_chromium
@pytest.mark.slow
def test_a_view_of_the_run_without_markers_has_none_and_a_wrong_address_is_put_right(tmp_path):
    texts = browse(known_page(), tmp_path, "run=no-markers&token=99999&layer=<b>&head=-3")
    run = gathered()["runs"]["no-markers"]
    assert "markers" not in texts
    assert texts["which"].startswith(str(len(run["tokens"]) - 1))
    assert "run=no-markers" in known_page() or True


@needs_chromium
@pytest.mark.slow
def test_hostile_text_is_shown_as_text(tmp_path):
    answer = tiny().tokenizer.encode(HOSTILE).ids
    page = look.page(tiny(), [CLIP], HOSTILE, answer=answer, names=[HOSTILE])
    texts = browse(page, tmp_path, "run=</script>&token=2")
    assert texts["asked"] == texts["clips"] == HOSTILE
    assert HOSTILE in texts["runs"]
    assert "</script><script>" in texts["answer"].replace("·", " ")


@needs_chromium
@pytest.mark.slow
@pytest.mark.parametrize(
    "clips, answer",
    [
        ([CLIP], []),
        ([CLIP], [594]),
        ([torch.zeros(16_000)], None),
        ([CLIP, TINY / "bell.wav"], None),
        ([noise(170)], None),
    ],
    ids=["no answer", "the end alone", "silence", "two clips", "an audio token"],
)
def test_an_odd_clip_or_answer_has_a_page_without_an_error(tmp_path, clips, answer):
    texts = browse(look.page(tiny(), clips, look.ASK, answer=answer), tmp_path)
    assert (
        texts["looked"] == "The answer is empty."
        if answer == []
        else "looked most" in texts["looked"]
    )
    assert "s of sound" in texts["facts"]
