"""eval.py FOLDER TEST...: a line for each data file: words wrong plain / stamped, ms, matched, questions, events."""
from pathlib import Path
import contextlib, io, json, re, sys
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
import torch
torch.set_num_threads(1)
import evaluate, make_tiny
for data in sys.argv[2:]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        evaluate.main(["--data", data, "--model", sys.argv[1], "--json"])
    found = json.loads(out.getvalue())
    p = found["prompts"]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        make_tiny.score_events(Path(sys.argv[1]), Path(data))
    ev = re.search(r"(\d+) of (\d+)", said.getvalue())
    a, b = p[make_tiny.PLAIN], p[make_tiny.STAMPS]
    when = [v for k, v in p.items() if k.startswith("When is")]
    print(f"{Path(data).stem:22s} plain {a['wer']:.3f} stamped {b['wer']:.3f} ms {b['aas_ms']} matched {b['matched']} questions {found['all']['accuracy']} events {ev[1]}/{ev[2]}", flush=True)
