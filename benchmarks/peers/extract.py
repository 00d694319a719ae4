"""numpy's full SVD of stacks of rows, centred.  usage: extract.py [THREADS]
Prints {"version", "threads"}, then answers one line for each line of its input: {"file": f32 values of all stacks, "stacks": [[rows, width], …], "k", "dtype"} →
{"wall", "cpu": seconds of mean, subtraction and SVD of all stacks, "lost": share of each stack's squares outside the first k right singular vectors}."""
import json, sys, time
import numpy as np
print(json.dumps({"version": np.__version__}), flush=True)
for line in sys.stdin:
    ask = json.loads(line); values = np.fromfile(ask["file"], np.float32); at = 0; wall = cpu = 0.0; lost = []
    for rows, width in ask["stacks"]:
        x = values[at:at + rows * width].reshape(rows, width).astype(ask["dtype"]); at += rows * width
        t, c = time.perf_counter(), time.process_time()
        centred = x - x.mean(0); v = np.linalg.svd(centred, full_matrices=False)[2]
        wall += time.perf_counter() - t; cpu += time.process_time() - c
        centred = centred.astype(np.float64); lost.append(1 - np.square(centred @ v[:ask["k"]].T.astype(np.float64)).sum() / np.square(centred).sum())
    print(json.dumps({"wall": wall, "cpu": cpu, "lost": lost}), flush=True)
