"""Packs synthetic adapters through Ray on this machine with examples/hub/pack.py, for `npm run bench hub -- --whole`.

    hub_ray.py SCRATCH COUNT,… SHARDS K CPUS COMMAND...   Prints the seconds of each and what assemble printed.

The adapters are names only: COMMAND makes those that it is given, and deletes them.
"""
import json, os, pathlib, sys, time

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "examples" / "hub"))
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
import ray
from pack import pack

scratch, counts, shards, k, cpus, *command = sys.argv[1:]
# Ray waits 30 seconds for its own start, which a busy machine needs longer for.
for attempt in range(5):
    try:
        ray.init(num_cpus=int(cpus), include_dashboard=False, log_to_driver=False)
        break
    except Exception:
        ray.shutdown()
        if attempt == 4:
            raise
hubs = []
for count in map(int, counts.split(",")):
    work = pathlib.Path(scratch) / str(count)
    adapters = [str(work / f"synthetic-{i:06}") for i in range(count)]
    start = time.monotonic()
    made = pack(adapters, str(work / "tasks.eigen"), str(work), command, shards=int(shards), k=int(k))
    hubs.append({"seconds": time.monotonic() - start, "bytes": made["bytes"]})
print(json.dumps({"hubs": hubs, "ray": ray.__version__}))
ray.shutdown()
