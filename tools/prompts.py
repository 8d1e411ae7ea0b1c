"""A prompt's ids in words.

    python tools/parity.py ids [AUDIO ...] --prompt TEXT --model FOLDER [--json]

No weights are loaded. --json prints {"ids": [...], "tokens": [...]}, with each token's id, what it
is, the number of its clip (from 1, or null) and its text.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from adapter import AdapterConfig
from encoder import HOP, load_audio
from moss_min import MossAudio, load_tokenizer, read_config


def what_ids_are(ids: list[int], config: AdapterConfig) -> Iterator[tuple[str, int | None]]:
    """Yields what each id of a prompt is, and the number of its clip, from 1; None for text."""
    names = {config.audio_start_id: "start", config.audio_end_id: "end"}
    names[config.audio_token_id] = "audio token"
    clip = 0
    inside = False
    for i in ids:
        if i == config.audio_start_id:
            clip += 1
            inside = True
        yield (names.get(i, "time marker"), clip) if inside else ("text", None)
        inside = inside and i != config.audio_end_id


def show_ids(args: argparse.Namespace) -> int:
    """Prints a prompt's ids as a table, audio tokens in a row on one line, or as JSON."""
    folder = Path(args.model)
    with torch.device("meta"):  # shapes without memory
        model = MossAudio(read_config(folder), load_tokenizer(folder))
    frames = [len(load_audio(name)) // HOP for name in args.audio]
    ids = model.prompt_ids(args.prompt, frames, args.time_markers)
    tokens = []
    for i, (what, clip) in zip(ids, what_ids_are(ids, model.config.adapter)):
        text = model.tokenizer.decode([i], skip_special_tokens=False)
        tokens.append({"id": i, "what": what, "clip": clip, "text": text})
    if args.json:
        print(json.dumps({"ids": ids, "tokens": tokens}))
        return 0
    print("position      id  text, or what it is")
    for position, token in enumerate(tokens):
        said = json.dumps(token["text"], ensure_ascii=False)
        said += f", {token['what']} of clip {token['clip']}" if token["clip"] else ""
        if token["what"] == "audio token":
            if ids[position - 1] == token["id"]:
                continue
            said = f"audio tokens of clip {token['clip']}, up to the next line"
        print(f"{position:8}  {token['id']:6}  {said}")
    return 0
