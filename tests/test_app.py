"""The app: driven by gradio's own client, and in a browser."""

import contextlib
import json
import os
import subprocess
import sys

import pytest

import app
from conftest import HERE, browse
from moss_min import TINY, load_tokenizer

LINES = [json.loads(line) for line in (TINY / "sounds.jsonl").read_text().splitlines()]
HOSTILE = "</script></iframe><img src=x onerror=alert(1)> \"'&amp; ${1+1} 🎵 שלום"
# A model that thinks and says that, and then full stops without an end.
ENDLESS = f"""
def endless(self, *_, **__):
    yield from self.tokenizer.encode({f"<think>{HOSTILE}</think>[0.5]{HOSTILE}[1.5]"!r}).ids
    while True:
        app.time.sleep(0.02)
        yield 13
app.MossAudio.generate = endless
"""


@contextlib.contextmanager
def running(folder, change=""):
    """The program's process, with temporary files in folder and a change, and a client of it."""
    gradio_client = pytest.importorskip("gradio_client", reason="needs gradio")
    command = [sys.executable, "-c", f"import sys, app\n{change}\nsys.exit(app.main([]))"]
    options = {"env": os.environ | {"TMPDIR": str(folder)}, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=HERE.parent / "tools", **options) as process:
        try:
            url = next(line for line in process.stderr if "is ready" in line).split()[0]
            yield process, gradio_client.Client(url, verbose=False)
        finally:
            process.terminate()


@contextlib.contextmanager
def asked(url, question):
    """A browser's page where that is asked about a sound."""
    with browse(url) as page:
        page.get_by_text("bell.wav").click()
        page.get_by_text("0:06").wait_for()  # the player has the sound
        page.get_by_role("textbox", name="Question").fill(question)
        page.get_by_role("button", name="Ask", exact=True).click()
        yield page


def test_a_timeline_shows_words_at_their_seconds_and_markup_as_text():
    drawn = app.draw_timeline("[0.50]one[1.00][1.50]<b>[2.50][7.0]late[99999.0]", 3.5)
    one = '<bdi style="left: 25.00%; width: 25.00%">one</bdi>'
    two = '<bdi style="left: {}.00%; width: 50.00%">&lt;b&gt;</bdi></p>'
    assert drawn == f"<small>0 s</small><p>{one}{two}<small>2 s</small><p>{two}".format(75, -25)


def test_without_gradio_one_line_says_so(monkeypatch, refused):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    assert refused(app.main).endswith("; expected it: pip install gradio")


@pytest.mark.slow
def test_a_client_gets_the_exact_greedy_text_or_a_sentence_and_sounds_are_removed(tmp_path):
    handle_file = pytest.importorskip("gradio_client", reason="needs gradio").handle_file
    with running(tmp_path) as (process, client):
        for line in LINES[:18:4]:
            clip, prompt, _ = [turn["content"] for turn in line["conversation"]]
            said, *_ = client.predict(handle_file(TINY / clip), prompt, api_name="/ask")
            assert said == load_tokenizer(TINY).decode(line["ids"])
        assert len(list(tmp_path.rglob("*.wav"))) == 5
        with pytest.raises(Exception, match="^the sound: "):
            client.predict(handle_file(TINY / "config.json"), api_name="/ask")
    assert process.returncode == 130 and not list(tmp_path.rglob("*.wav"))


@pytest.mark.slow
def test_a_browser_shows_the_exact_greedy_text_and_the_page_of_that_answer(tmp_path):
    shown = "said => [...document.querySelectorAll('textarea')].at(-1).value == said"
    with running(tmp_path) as (_, client), asked(client.src, app.look.ASK) as page:
        page.wait_for_function(shown, arg=load_tokenizer(TINY).decode(LINES[0]["ids"]))
        page.get_by_role("tab", name="What it hears").click()
        page.get_by_role("button", name="Show what").click()
        page.frame_locator("iframe").get_by_text(f"asked {app.look.ASK}").wait_for()


@pytest.mark.slow
def test_hostile_text_is_text_and_a_question_waits_until_another_is_stopped(tmp_path):
    with running(tmp_path, ENDLESS) as (_, client), asked(client.src, HOSTILE) as page:
        page.locator("bdi", has_text=HOSTILE).wait_for()
        waiting = client.submit(None, api_name="/ask")
        page.wait_for_timeout(2000)
        assert not waiting.outputs()
        page.get_by_role("button", name="Stop").click()
        assert any(waiting.outputs() or page.wait_for_timeout(100) for _ in range(1200))
