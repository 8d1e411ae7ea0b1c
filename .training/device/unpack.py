import numpy as np, soundfile, gzip, sys
from multiprocessing import Pool
from pathlib import Path
def one(p): return soundfile.read(p, dtype="int16")[0]
out = Path("/tmp/bank"); out.mkdir(exist_ok=True)
if __name__ == "__main__":
    paths = sorted([*Path("/tmp/pack1").glob("*.mp3"), *Path("/tmp/pack2").glob("*.mp3")], key=lambda p: p.name)
    with Pool(16) as pool: waves = pool.map(one, paths, chunksize=1)
    for name in ("espeak", "flite", "festival", "kokoro"):
        w = np.concatenate([w for p, w in zip(paths, waves) if p.name.startswith(name)])
        np.save(out / f"{name}.npy", w)
        (out / f"{name}.json").write_bytes(gzip.decompress(Path(f"/tmp/pack1/{name}.json.gz").read_bytes()))
        print(name, len(w) / 16000, flush=True)
