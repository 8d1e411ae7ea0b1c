import numpy as np, soundfile, sys, json
from multiprocessing import Pool
from pathlib import Path
B, D = Path(sys.argv[1]), Path(sys.argv[2]); D.mkdir(parents=True, exist_ok=True)
def one(job):
    name, i, a, b = job
    w = np.load(B / f"{name}.npy", mmap_mode="r")[a:b]
    p = D / f"{name}-{i:03}.mp3"
    soundfile.write(p, w, 16000, format="MP3", subtype="MPEG_LAYER_III", compression_level=0.9)
    r = soundfile.read(p, dtype="int16")[0]
    return name, i, len(w), len(r), float((r[:len(w)].astype(float) - w[:len(r)]).std() / w.astype(float).std()), p.stat().st_size
jobs = []
for name in ("espeak", "flite", "festival", "kokoro"):
    n = len(np.load(B / f"{name}.npy", mmap_mode="r")); S = 16000 * 600
    jobs += [(name, i, a, min(n, a + S)) for i, a in enumerate(range(0, n, S))]
with Pool(2) as p: res = p.map(one, jobs, chunksize=1)
bad = [r for r in res if r[2] != r[3]]
print(len(res), "bad", bad[:5], "err", np.mean([r[4] for r in res]), "MB", sum(r[5] for r in res) / 1e6, "s", sum(r[2] for r in res) / 16000)
