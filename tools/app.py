"""An app to try: ask a model about a sound in the browser, and see what it hears.

pip install gradio && python tools/app.py --model FOLDER"""

import html
import math
import os
import re
import signal
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import look
from common import say
from encoder import SAMPLE_RATE, load_audio
from evaluate import read_data
from moss_min import TINY, MossAudio, Parser, add_model_options, end
from sample import Sampling, split_thinking

TIMED_WORD = re.compile(rf"{look.STAMP.pattern}([^][]+)(?={look.STAMP.pattern})")
STYLE = """
#timeline small { float: left; line-height: 2.4 }
#timeline p { position: relative; height: 2em; margin: 0 0 3px 3em; overflow: hidden }
#timeline p, #timeline bdi { background: #8883; line-height: 2; text-align: center }
#timeline bdi { position: absolute; white-space: nowrap; border-left: 2px solid coral }
iframe { width: 100%; height: 85vh }
"""


def draw_timeline(answer: str, seconds: float) -> str:
    """Returns HTML with the words between timestamps as boxes, two seconds a line, if any are."""
    lines = [f"<small>{2 * i} s</small><p>" for i in range(math.ceil(seconds / 2))]
    for start, word, stop in TIMED_WORD.findall(answer):
        first = float(start) / 2
        last = float(stop) / 2
        for i in range(int(first), min(math.ceil(last), len(lines))):
            place = f"left: {first - i:.2%}; width: {last - first:.2%}"
            lines[i] += f'<bdi style="{place}">{html.escape(word)}</bdi>'
    return "</p>".join([*lines, ""]) if TIMED_WORD.search(answer) else ""


def build(gradio, model: MossAudio):
    """Returns the app, with some of tiny's sounds and questions as examples."""

    def ask(file, text, markers, hide, *sampling):
        """Yields what is shown of an answer as it streams."""
        try:

            def drawn():
                # At the end may stand a character whose last byte is yet to come.
                thought, answer = split_thinking(model.tokenizer.decode(ids).rstrip("\ufffd"))
                folder = gradio.Accordion(visible=bool(thought) and not hide)
                rate = (len(ids) - 1) / max(times[-1] - times[0], 1e-9)
                speed = f"{len(ids)} tokens, {rate:.1f} a second"
                asked = (clips, text, ids, markers)
                return answer, folder, thought, draw_timeline(answer, seconds), speed, asked, ""

            clips = [load_audio(file)] if file else []
            seconds = sum(len(clip) for clip in clips) / SAMPLE_RATE
            ids = []
            times = []
            due = 0
            for token in model.generate(model.prompt(text, clips, markers), *sampling):
                ids.append(token)
                times.append(time.perf_counter())
                if times[-1] > due:  # a browser could not keep up with each token
                    yield drawn()
                    due = times[-1] + 0.1
            yield drawn()
            if model.is_cut(ids):
                gradio.Warning(f"The answer is cut after {len(ids)} tokens: no room for more")
        except (ValueError, OSError) as error:
            said = str(error).replace(file, "the sound") if file else str(error)  # no long path
            raise gradio.Error(html.escape(said, quote=False), print_exception=False) from error

    def show(asked):
        """Returns the page of look.py for the last answer, in a frame that can't reach the app."""
        if asked is None:
            return "Ask a question first."
        inside = html.escape(look.page(model, *asked))
        return f'<iframe title="look" sandbox="allow-scripts" srcdoc="{inside}"></iframe>'

    lines = read_data(TINY / "sounds.jsonl", need_sound=True).values()
    # Three questions about each sound come one after the other: every fourth is of another sound.
    examples = [line for line in lines if len(line.clips) == 1][::4]
    gradio.set_static_paths([TINY])  # or the examples would be copied, and removed like uploads
    with gradio.Blocks(title="moss-min", delete_cache=(60, 3600)) as app:
        asked = gradio.State()
        with gradio.Tab("Ask"), gradio.Row():
            with gradio.Column():
                # Its usual buttons would offer to share the sound on a website.
                sound = gradio.Audio(label="Sound", type="filepath", editable=False, buttons=[])
                text = gradio.Textbox(look.ASK, label="Question", submit_btn="Ask", stop_btn="Stop")
                with gradio.Accordion("Settings", open=False), gradio.Row():
                    # gradio shows 0 in a field that is empty at first, so none is.
                    usual = asdict(Sampling(4096, temperature=0, seed=0, thinking_budget=4096))
                    sampling = [gradio.Number(usual[i], label=i, min_width=130) for i in usual]
                on = model.config.adapter.enable_time_marker
                markers = gradio.Checkbox(on, label="Time markers")
                hide = gradio.Checkbox(label="Hide thinking")
            with gradio.Column():
                with gradio.Accordion("Thinking", open=False, visible=False) as folder:
                    thought = gradio.Textbox(show_label=False, container=False)
                answer = gradio.Textbox(label="Answer", lines=3, buttons=["copy"])
                timeline = gradio.HTML(elem_id="timeline")
                speed = gradio.Markdown()
                gradio.Examples([[str(e.clips[0]), e.prompt] for e in examples], [sound, text])
        with gradio.Tab("What it hears"):
            showing = gradio.Button("Show what the model hears and where it looks")
            page = gradio.HTML()
        outputs = [answer, folder, thought, timeline, speed, asked, page]
        one = {"concurrency_limit": 1, "concurrency_id": "model"}  # for both: it is one model
        asking = text.submit(ask, [sound, text, markers, hide, *sampling], outputs, **one)
        showing.click(show, asked, page, **one)
        text.stop(None, cancels=asking)
    return app


def run(argv: list[str] | None) -> None:
    parser = Parser("app.py", __doc__)
    add_model_options(parser)
    parser.add_argument("--host", default="127.0.0.1", help="where to listen (%(default)s)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        # gradio reads these as it is imported. What is uploaded goes with the folder.
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False"}
        os.environ["GRADIO_TEMP_DIR"] = folder
        try:
            import gradio
        except ImportError as error:
            raise ValueError(f"{error}; expected it: pip install gradio") from error
        model = MossAudio.from_pretrained(args.model, args.device, args.dtype, say)
        options = {"share": False, "quiet": True, "show_error": True, "footer_links": []}
        options |= {"server_name": args.host, "css": STYLE}
        _, url, _ = build(gradio, model).launch(prevent_thread_lock=True, **options)
        say(f"{url} is ready; Ctrl-C ends it")
        while True:
            time.sleep(1)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # it ends as by Ctrl-C
    return end("app", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
