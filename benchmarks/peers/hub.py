"""numpy sums the same Gram matrices, finds the same components and projects.  usage: hub.py K FEW ADAPTER_DIR...
One thread. Prints JSON: seconds of a core per adapter to sum and to project, from the difference of all and FEW adapters, and of LAPACK's eigh."""
import json, pathlib, sys, time
import numpy as np
from safetensors.numpy import load_file
k, few, folders = int(sys.argv[1]), int(sys.argv[2]), [pathlib.Path(f) for f in sys.argv[3:]]
def factors(folder): w = load_file(folder / "adapter_model.safetensors"); return [next(v for n, v in w.items() if "lora_A" in n), next(v for n, v in w.items() if "lora_B" in n).T]
def sums(some):
    # The number of rows that eigenlora multiplies at once.
    start, width = time.process_time(), factors(some[0])[0].shape[1]; block = max(1, 2**22 // width // 32)
    grams, total = [np.zeros((width, width)) for _ in range(2)], [np.zeros(width) for _ in range(2)]
    for i in range(0, len(some), block):
        both = [factors(f) for f in some[i:i + block]]
        for s in range(2):
            rows = np.concatenate([f[s] for f in both]).astype(np.float64); grams[s] += rows.T @ rows; total[s] += rows.sum(0)
    return time.process_time() - start, grams, total
def project(some, bases):
    start = time.process_time(); done = [[(f[s] - m).astype(np.float64) @ e.T for s, (e, m) in enumerate(bases)] for f in map(factors, some)]
    return time.process_time() - start
a, _, _ = sums(folders[:few]); b, grams, total = sums(folders); n = 32 * len(folders)
start, bases = time.process_time(), []
for g, s in zip(grams, total):
    mean = s / n; values, vectors = np.linalg.eigh(g - n * np.outer(mean, mean)); bases.append((vectors.T[::-1][:k].copy(), mean.astype(np.float32)))
basis = time.process_time() - start; p, q = project(folders[:few], bases), project(folders, bases); rest = len(folders) - few
print(json.dumps({"version": f"numpy {np.__version__}", "shard": (b - a) / rest, "basis": basis, "project": (q - p) / rest}))
