"""lorashare compresses the same adapters.  usage: pack.py OUT_DIR ADAPTER_DIR...   Prints JSON: seconds from files to files, one thread."""
import json, pathlib, resource, shutil, statistics, sys, time
import torch; torch.set_num_threads(1)
import lorashare
from importlib.metadata import version
out = pathlib.Path(sys.argv[1]); times = []
for i in range(6):
    shutil.rmtree(out, ignore_errors=True); t = time.perf_counter()
    m = lorashare.SHAREModel.from_adapters(sys.argv[2:]); t1 = time.perf_counter(); m.save_pretrained(out); times.append((t1 - t, time.perf_counter() - t))
size = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
print(json.dumps({"version": f"lorashare {version('lorashare')}, torch {torch.__version__}", "first": times[0][1], "median": statistics.median(x[1] for x in times), "min": min(x[1] for x in times), "bytes": size, "peakMemoryBytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))
