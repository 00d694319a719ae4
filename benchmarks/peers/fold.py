"""Peer of benchmarks/fold.js: torch.addmm(W, B, A, out=...) on one thread, f32. Prints one JSON object.

python fold.py MATRICES SIZE RUNS RANK...
"""

import json
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
    times = []
    for run in range(-5, runs):
        start = time.perf_counter()
        for i in range(matrices):
            torch.addmm(weights[i], b, a, out=out[i])
        if run >= 0:
            times.append(time.perf_counter() - start)
    times.sort()
    seconds[rank] = {"min": times[0], "median": times[len(times) // 2]}

print(
    json.dumps(
        {
            "version": torch.__version__,
            "capability": torch.backends.cpu.get_cpu_capability(),
            "seconds": seconds,
        }
    )
)
