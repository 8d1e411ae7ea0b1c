"""tools/look.py: what a page says is what the model does, and a browser shows it."""

import base64
import contextlib
import functools
import json
import re
import sys
import zlib
from pathlib import Path

import pytest
import torch

import look
import stages
from conftest import (
    browse,
    golden_case,
    golden_model,
    golden_prompt,
    largest_error,
    noise,
    tiny,
    write_clip,
)
from moss_min import TINY, load_audio

CLIP = TINY / "meters.wav"
HOSTILE = "</script><script>alert(1)</script> \"quoted\" & 'so' <b>\U0001f514 שלום"


@functools.cache
def gathered() -> dict:
    return look.gather(tiny(), [CLIP], look.ASK)


@functools.cache
def known_page() -> str:
    return look.page(tiny(), [CLIP], look.ASK, source="https://a.example/b")


def block(page: str) -> dict:
    """The page's JSON."""
    return json.loads(re.search(r'application/json">(.*?)</script>', page, re.DOTALL)[1])


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


def test_deepstack_and_the_first_choice_are_as_in_upstreams_stages():
    case = golden_case("long").tensors
    run = look.see(golden_model(), golden_prompt("long"), answer=case["generated"].tolist())
    heard = [kind == look.SOUND for kind in run["kinds"]]
    for k, ratios in enumerate(run["added"]):
        rows = case[f"deepstack.{k}"]
        before = case[f"decoder.layers.{k}"][heard] - rows
        expected = rows.norm(dim=1) / before.norm(dim=1)
        torch.testing.assert_close(torch.tensor(ratios), expected, rtol=1e-4, atol=1e-5)
    best = case["logits"][0].softmax(-1).topk(10)
    names, shares = zip(*run["tokens"][0]["rivals"])
    tokenizer = golden_model().tokenizer
    assert list(names) == [look.name_of(tokenizer, token) for token in best.indices.tolist()]
    assert shares == pytest.approx(best.values.tolist(), abs=2e-5)
    assert run["tokens"][0]["layers"][-1] == run["tokens"][0]["rivals"][0]


def test_the_whole_run_is_the_models_greedy_answer():
    answer = tiny().generate(tiny().prompt(look.ASK, [CLIP]), temperature=0)
    assert [token["id"] for token in gathered()["runs"]["whole"]["tokens"]] == list(answer)


def test_without_deepstack_the_answer_begins_as_the_stages_without_it_say():
    bare = stages.Run(tiny(), look.ASK, True, 1)
    bare.merger_of_layer = {}
    logits = dict(stages.compute(bare, {"waveform.0": load_audio(CLIP)}))["logits"][-1]
    run = gathered()["runs"]["no-deepstack"]
    best, share = run["tokens"][0]["rivals"][0]
    assert best == look.name_of(tiny().tokenizer, int(logits.argmax()))
    assert share == pytest.approx(float(logits.softmax(-1).max()), abs=1e-4)
    assert run["added"] == []


def test_all_attention_goes_to_text_markers_sound_and_answer():
    for run in gathered()["runs"].values():
        stored = (run["attention"].double() / 255) ** 2  # [n, L, H or 1, C + 4]
        shares = stored[..., -4:]
        for kind in (look.TEXT, look.MARKER, look.SOUND):
            columns = stored[..., :-4][..., torch.tensor(run["kinds"]) == kind]
            assert (columns.sum(-1) - shares[..., kind]).abs().max() < 0.02  # of 8 bits
        assert (shares.sum(-1) - 1).abs().max() < 0.01
        assert shares[0, ..., look.ANSWER].max() == 0 < shares[-1, ..., look.ANSWER].min()


def test_a_marker_of_two_digits_is_two_tokens_after_125_audio_tokens():
    kinds = look.see(tiny(), tiny().prompt("Hm.", [noise(160_000)]), answer=[1])["kinds"]
    first = kinds.index(look.SOUND)
    assert kinds[first : first + 132] == 5 * ([2] * 25 + [1]) + [1, 0]


def test_two_clips_lie_one_after_the_other_with_their_padding():
    first, second = look.layout([50, 620], 200)
    assert (first["end"], first["padded"], second["start"]) == (50, 400, 400)
    assert first["tokens"] == [0, 8, 16, 24, 32, 40, 48]
    assert (second["chunks"], second["end"], second["padded"]) == ([400, 800], 1020, 1200)
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
    assert len(ids) > 3 and pieces == ["a", *[""] * (len(ids) - 3), "\U0001f514", "b"]


def test_what_is_too_much_is_averaged_and_the_page_says_so(monkeypatch):
    sizes = {"MOST_TOKENS": 5, "MOST_FRAMES": 100, "MOST_SAMPLES": 1000, "HEADS_BYTES": 0}
    for name, most in (sizes | {"LAYERS_BYTES": 20 * 40}).items():
        monkeypatch.setattr(look, name, most)
    data = block(look.page(tiny(), [CLIP], look.ASK))
    run = data["runs"]["whole"]
    assert run["shape"] == [5, 4, 1, -(-len(run["ids"]) // 2) + 4] and run["pool"] == 2
    assert len(zlib.decompress(base64.b64decode(data["mel"]))) == 128 * 100
    assert len(zlib.decompress(base64.b64decode(data["sound"]))) == 44 + 2 * 1000
    for said in ("at most 5 tokens", "in all runs", " 3 frames", "and 2 tokens"):
        assert said in data["note"]


def test_each_panel_names_a_function_that_its_file_has():
    named = re.findall(r'data-file="(\w+\.py)">([\w.]+) in \1<', look.TEMPLATE.read_text())
    assert len(named) == 6
    for file, name in named:
        code = (TINY.parent / file).read_text()
        assert f"def {name.split('.')[-1]}(" in code and f" {name.split('.')[0]}(" in code


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


def test_wrong_input_is_one_line(tmp_path, monkeypatch, refused):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "none.wav" in refused(look.main, "none.wav")
    line = refused(look.main, CLIP, "--png", tmp_path / "look.png")
    assert "pip install matplotlib" in line


# ---- in a browser ----


@contextlib.contextmanager
def opened(page: str, folder: Path, fragment: str, **options):
    """A browser's page that was opened from a file, once its script has run."""
    path = folder / "look.html"
    path.write_text(page)
    with browse(f"file://{path}#{fragment}", **options) as shown:
        shown.locator("#looked:not(:empty)").wait_for()
        yield shown


def text_in(shown, name: str) -> str:
    return shown.locator(f"#{name}").text_content()


@pytest.mark.slow
def test_a_linked_view_shows_the_words_and_where_its_token_looked(tmp_path):
    run = gathered()["runs"]["whole"]
    first = run["words"][1]["tokens"][0]
    piece = run["pieces"][first]
    weights = (run["attention"][first, 2, 1].double() / 255) ** 2
    sound = weights[: len(run["kinds"])][torch.tensor(run["kinds"]) == look.SOUND]
    peak = int(sound.argmax())
    where = f"from {0.08 * peak:.2f} s to {0.08 * (peak + 1):.2f} s, audio token {peak + 1}"
    with opened(known_page(), tmp_path, f"token={first}&layer=2&head=1&run=whole") as shown:
        looked = text_in(shown, "looked")
        assert f"“{piece}”, the decoder looked most at the sound {where}" in looked
        assert f": {100 * float(sound[peak]):.1f} % of its attention" in looked
        assert text_in(shown, "words") == "".join(word["text"] for word in run["words"])
        assert (text_in(shown, "markers"), text_in(shown, "clips")) == ("2", "meters.wav")
        assert text_in(shown, "before").startswith("<|im_start|>system↵You·are·a·helpful")
        assert shown.locator("#rivals b").count() == 10
        assert shown.locator("a").first.get_attribute("href") == "https://a.example/b/encoder.py"
        for other in gathered()["runs"].values():
            assert "".join(other["pieces"]) in text_in(shown, "runs")


@pytest.mark.slow
@pytest.mark.parametrize("width, scheme", [(1280, "light"), (400, "dark")])
def test_keys_buttons_and_the_pointer_change_the_view_and_its_address(tmp_path, width, scheme):
    options = {"viewport": {"width": width, "height": 900}, "color_scheme": scheme}
    with opened(known_page(), tmp_path, "run=x&token=99999&layer=<b>&head=-3", **options) as shown:
        last = len(gathered()["runs"]["whole"]["tokens"]) - 1
        assert shown.url.endswith(f"#run=whole&token={last}&layer=0&head=0")
        shown.keyboard.press("ArrowLeft")
        assert text_in(shown, "which").startswith(f"{last - 1} ")
        shown.locator("#sound canvas").hover(position={"x": 1, "y": 5})
        assert "audio token 1: position" in text_in(shown, "tip")
        shown.locator("#no-markers").click()
        assert text_in(shown, "markers") == "" and "run=no-markers" in shown.url
        assert shown.evaluate("document.documentElement.scrollWidth") == width
        paper = shown.locator("body").evaluate("body => getComputedStyle(body).backgroundColor")
        assert paper == {"light": "rgb(253, 253, 251)", "dark": "rgb(21, 23, 27)"}[scheme]


@pytest.mark.slow
def test_hostile_text_is_shown_as_text_and_a_given_answer_is_followed(tmp_path):
    answer = tiny().tokenizer.encode(HOSTILE).ids
    page = look.page(tiny(), [CLIP], HOSTILE, answer=answer)
    assert page.count("</script>") == known_page().count("</script>") == 2
    with opened(page, tmp_path, "run=</script>&token=2") as shown:
        assert text_in(shown, "asked") == HOSTILE
        assert HOSTILE in text_in(shown, "runs")


@pytest.mark.slow
def test_odd_clips_and_answers_have_a_page_without_an_error(tmp_path):
    for clips, answer, said in [
        ([CLIP], [], "The answer is empty."),
        ([CLIP], list(tiny().config.stop_ids[:1]), "looked most"),
        ([torch.zeros(16_000)], None, "looked most"),
        ([noise(170)], [1], "looked most"),
        ([CLIP, TINY / "bell.wav"], None, "looked most"),
    ]:
        with opened(look.page(tiny(), clips, look.ASK, answer=answer), tmp_path, "") as shown:
            assert said in text_in(shown, "looked")
            markers = text_in(shown, "markers")
            assert markers == ("224" if len(clips) == 2 else "2" if clips[0] is CLIP else "")
