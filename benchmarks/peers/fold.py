"""Peer of benchmarks/fold.js: torch.addmm(W, B, A, out=...) on one thread, f32. Prints one JSON object.

python fold.py MATRICES SIZE RUNS RANK...
"""

import json
import statistics
import sys
import time

import torch

matrices, size, runs, *ranks = map(int, sys.argv[1:])
torch.set_num_threads(1)
torch.manual_seed(0)

weights = torch.rand(matrices, size, size) * 0.1 - 0.05
out = torch.empty_like(weights)
seconds = {}
for rank in ranks:
    b = torch.rand(size, rank) * 0.1 - 0.05
    a = torch.rand(rank, size) * 0.1 - 0.05
    # Each matrix by itself, as ours are: other programs rarely leave a machine alone for a whole run.
    times = [[] for _ in range(matrices)]
    for run in range(-5, runs):
        for i in range(matrices):
            start = time.perf_counter()
            torch.addmm(weights[i], b, a, out=out[i])
            if run >= 0:
                times[i].append(time.perf_counter() - start)
    seconds[rank] = {"min": sum(map(min, times)), "median": sum(map(statistics.median, times))}

print(
    json.dumps(
        {
            "version": torch.__version__,
            "capability": torch.backends.cpu.get_cpu_capability(),
            "seconds": seconds,
        }
    )
)
