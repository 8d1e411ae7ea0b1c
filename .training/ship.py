"""ship.py [--write]: compares the answers in sounds.jsonl with those of tiny/, and writes its ids anew."""
from pathlib import Path
import json, sys
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
from moss_min import MossAudio
from train import read_line
tiny = ROOT / "tiny"; model = MossAudio.from_pretrained(tiny, "cpu", "float32"); out = []
for line in (tiny / "sounds.jsonl").read_text("utf-8").splitlines():
    (sound,), prompt, answer = read_line(line, tiny)
    p = model.prompt(prompt, sound); ids = list(model.generate(p, temperature=0))
    text = model.tokenizer.decode(ids)
    print("same " if text == answer else "OTHER", sound.name, prompt, "|", answer, "|", text)
    out.append(json.dumps(json.loads(line) | {"ids": ids}, ensure_ascii=False))
if "--write" in sys.argv: (tiny / "sounds.jsonl").write_text("\n".join(out) + "\n", "utf-8")
