"""A prompt's ids in words, and the known ways in which a server's prompt is another.

    python tools/parity.py ids [AUDIO ...] --prompt TEXT --model FOLDER [--json]

No weights are loaded. --json prints {"ids": [...], "tokens": [...]}, with each token's id, what it
is, the number of its clip (from 1, or null) and its text.
"""

import argparse
import contextlib
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from decoding import common_count
from encoder import HOP, load_audio, require
from moss_min import CLIP, PLACEHOLDER, SYSTEM, USER, MossAudio, load_tokenizer, read_config

AUDIO_TOKEN = "an audio token"  # what such an id is, in words


def special_ids(model: MossAudio) -> list[int]:
    """Returns the ids of an audio token, a clip's start and its end."""
    config = model.config.adapter
    return [config.audio_token_id, config.audio_start_id, config.audio_end_id]


def what_ids_are(ids: list[int], special: Sequence[int]) -> list[tuple[str, int]]:
    """Returns what each id of a prompt is, and the number of the clip that it is in, from 1; 0 for
    text. special: the model's special_ids."""
    names = [AUDIO_TOKEN, "a clip's start", "a clip's end"]
    _, start, end = special
    found = []
    clip = 0
    inside = False
    for i in ids:
        if i == start:
            clip += 1
            inside = True
        if not inside:
            found.append(("text", 0))
        elif i in special:
            found.append((names[special.index(i)], clip))
        else:
            found.append(("a time marker", clip))
        if i == end:
            inside = False
    return found


def where_prompts_part(
    ours: list[int], theirs: list[int], special: Sequence[int], show: Callable[[int], str] = str
) -> tuple[int, str]:
    """Returns where two prompts that differ do so first, and in a sentence what that means. show:
    how an id is written."""
    words = [what for what, _ in what_ids_are(ours, special)]
    audio = special[0]
    expected = ours.count(audio)
    count = theirs.count(audio)
    at = common_count(ours, theirs)
    if expected and not count:
        means = f"there is no audio token, {audio}: the placeholder was read as text"
    elif count != expected:
        means = f"there are {count} audio tokens, expected {expected}: the sound is another, or"
        means += " its log-mel has another length"
        if count == 375:
            means += " (375 are 30 s: the sound was padded)"
    elif theirs == [i for i, word in zip(ours, words) if word != "a time marker"]:
        means = "the time markers are missing, the seconds in digits after every 25 audio tokens"
    elif words[at : at + 1] == ["a time marker"]:
        means = "the time markers are others, the seconds in digits after every 25 audio tokens"
    else:
        means = (
            "the text is another, or its tokens are (the text around a clip is tokenized in parts)"
        )
    here = f"{show(ours[at])}, {words[at]}" if at < len(ours) else "nothing"
    there = show(theirs[at]) if at < len(theirs) else "nothing"
    return at, (
        f"The prompts differ from position {at} on ({there}, expected {here}; {len(theirs)} ids in "
        f"all, expected {len(ours)}): {means}."
    )


def show_ids(args: argparse.Namespace) -> int:
    """Prints a prompt's ids as a table, audio tokens in a row on one line, or as JSON."""
    folder = Path(args.model)
    with torch.device("meta"):  # shapes without memory
        model = MossAudio(read_config(folder), load_tokenizer(folder))
    frames = [len(load_audio(name)) // HOP for name in args.audio]
    ids = model.prompt_ids(args.prompt, frames, args.time_markers)
    tokens = []
    for i, (what, clip) in zip(ids, what_ids_are(ids, special_ids(model))):
        text = model.tokenizer.decode([i], skip_special_tokens=False)
        tokens.append({"id": i, "what": what, "clip": clip or None, "text": text})
    if args.json:
        print(json.dumps({"ids": ids, "tokens": tokens}))
        return 0
    print("position      id  text, or what it is")
    for position, token in enumerate(tokens):
        said = json.dumps(token["text"], ensure_ascii=False)
        said += f", {token['what']}, clip {token['clip']}" if token["clip"] else ""
        if token["what"] == AUDIO_TOKEN:
            if ids[position - 1] == token["id"]:
                continue
            said = f"audio tokens of clip {token['clip']}, up to the next line"
        print(f"{position:8}  {token['id']:6}  {said}")
    return 0


# ---- how a server's prompt is another ----


class Source(NamedTuple):
    """What a prompt's ids are made of."""

    text: str  # the whole prompt, with a placeholder for each clip
    frames: list[int]  # each clip's mel frames
    markers: bool | None = None

    def ids(self, model: MossAudio) -> list[int]:
        if self.frames:
            return model.prompt_ids(self.text, self.frames, self.markers)
        # Without placeholders, prompt_ids would wrap the text once more.
        return model.tokenizer.encode(self.text, add_special_tokens=False).ids


def chat(prompt: str, frames: list[int]) -> Source:
    """Returns the model's own prompt of a user's text about clips."""
    require(not PLACEHOLDER.search(prompt), "--prompt has placeholders; expected text alone")
    clips = CLIP * len(frames) + "\n" if frames else ""
    return Source(SYSTEM + USER.format(clips + prompt), frames)


class Cause(NamedTuple):
    """A known way in which a prompt is another, what to do about it, and how it is made so."""

    what: str
    advice: str
    change: Callable[[Source], Source]


def edit(old: str, new: str) -> Callable[[Source], Source]:
    return lambda source: source._replace(text=source.text.replace(old, new))


def no_clip(source: Source) -> Source:
    text = source.text.replace(CLIP * len(source.frames) + "\n", "")
    return Source(text, [], source.markers)


def padded(source: Source) -> Source:
    return source._replace(frames=[max(count, 3000) for count in source.frames])


def cut(source: Source) -> Source:
    return source._replace(frames=[min(count, 3000) for count in source.frames])


TEMPLATE = "give the server the checkpoint's chat template (vLLM: --chat-template FILE)"
JINJA = 'write that line end as {{ "\\n" }} in the chat template: jinja drops the last one'
MARKERS = "start vLLM with --mm-processor-kwargs '{\"enable_time_marker\": true}'"
SOUND = "let the server take all of the sound as it is"
ANSWER = "<|im_start|>assistant\n"
THOUGHT = "<think>\n\n</think>\n\n"
CAUSES = [
    Cause("the time markers are missing", MARKERS, lambda source: source._replace(markers=False)),
    Cause("the system prompt is missing", TEMPLATE, edit(SYSTEM, "")),
    Cause("the last line end is missing", JINJA, edit(ANSWER, ANSWER.strip())),
    Cause(f"{ANSWER.strip()} is missing", "ask with add_generation_prompt", edit(ANSWER, "")),
    Cause("an empty thought is appended", TEMPLATE, edit(ANSWER, ANSWER + THOUGHT)),
    Cause("no line end follows the clips", TEMPLATE, edit(CLIP + "\n", CLIP)),
    Cause("a line end stands between clips", TEMPLATE, edit(CLIP + "<", CLIP + "\n<")),
    Cause("no clip is there", SOUND, no_clip),
    Cause("the sound is padded to 30 s", SOUND, padded),
    Cause("the sound is cut to 30 s", SOUND, cut),
]


def find_causes(
    model: MossAudio, source: Source, fits: Callable[[list[int]], bool]
) -> list[tuple[Cause, ...]]:
    """Returns each cause that turns a prompt into ids that fit, or else each two causes that do."""
    found = []
    for causes in [*itertools.combinations(CAUSES, 1), *itertools.combinations(CAUSES, 2)]:
        if found and len(causes) > len(found[0]):
            break
        changed = source
        for cause in causes:
            changed = cause.change(changed)
        # Padded sound may be longer than the context.
        with contextlib.suppress(ValueError):
            if fits(changed.ids(model)):
                found.append(causes)
    return found
