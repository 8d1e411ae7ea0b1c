"""Four runs of make_tiny train at once, that share the composed batches: python four.py BANK OUT SECONDS ALONE STEPS WORKERS [DEVICE]"""
import os, sys, time, itertools
from pathlib import Path
sys.path.insert(0, "tools")
import torch, numpy as np
import torch.multiprocessing as mp
RUNS = {"whole": [], "nomarkers": ["--no-time-markers"], "nodeepstack": ["--no-deepstack"], "neither": ["--no-time-markers", "--no-deepstack"]}
def trainer(name, queue, bank, out, seconds, alone, steps, device):
    sys.path.insert(0, "tools")
    import make_tiny as m
    sys.stdout = open(f"{out}/{name}.log", "w", buffering=1)
    m.test = lambda *_: {}
    k = int("--no-time-markers" in RUNS[name])
    def loader(*_, **__):
        while True:
            batch = queue.get()
            yield batch._replace(runs=batch.runs[k : k + 1])
    m.torch.utils.data.DataLoader = loader
    status = m.main(["train", bank, f"{out}/{name}", "--alone", str(alone), "--steps", str(steps), "--seconds", str(seconds), "--device", device, *RUNS[name]])
    print("status", status, "peak", torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0)
    sys.stdout.flush(); os._exit(status)
if __name__ == "__main__":
    import make_tiny as m
    bank, out, seconds, alone, steps, workers = sys.argv[1], sys.argv[2], float(sys.argv[3]), *map(int, sys.argv[4:7])
    device = sys.argv[7] if len(sys.argv) > 7 else "cuda"
    Path(out).mkdir(parents=True, exist_ok=True)
    class Shared(m.Batches):
        def __iter__(self):
            torch.set_num_threads(1)
            worker = torch.utils.data.get_worker_info()
            b = m.Bank(self.bank, held=False)
            models = [m.random_model(f, 0) for f in self.folder]
            for step in itertools.count(self.first + worker.id, worker.num_workers):
                stage, done = self.schedule.stage(step)
                rng, done = np.random.default_rng([self.seed, step]), done if stage else 0.06 + 0.2 * done
                clips = m.draw_clips(b, rng, done, self.seconds)
                batches = [m.make_batch(model, clips, 1 if stage else 0) for model in models[: 2 if stage else 1]]
                yield batches[0]._replace(runs=[run for batch in batches for run in batch.runs])
    folders = [Path(out) / "f0", Path(out) / "f1"]
    for f, markers in zip(folders, (True, False)): m.write_folder(f, markers, True)
    ctx = mp.get_context("spawn")
    queues = {name: ctx.Queue(maxsize=6) for name in RUNS}
    procs = [ctx.Process(target=trainer, args=(name, queues[name], bank, out, seconds, alone, steps, device)) for name in RUNS]
    for p in procs: p.start()
    first = alone if Path(f"{out}/whole/training/state.safetensors").exists() else 0  # states of the stage before, unpacked for all four
    data = Shared(Path(bank), folders, m.Schedule(alone, steps), 0, first, seconds, 1)
    loader = torch.utils.data.DataLoader(data, batch_size=None, num_workers=workers, prefetch_factor=4)
    t = time.time()
    for i, batch in enumerate(loader):
        for q in queues.values(): q.put(batch)
        if i % 100 == 0: print(i, f"{time.time() - t:.1f} s", flush=True)
        if first + i > steps: break
    for p in procs: p.join(40)
    print("done", [p.exitcode for p in procs], f"{time.time() - t:.1f} s", flush=True)
    os._exit(0)
