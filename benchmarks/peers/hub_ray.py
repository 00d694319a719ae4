"""Packs synthetic adapters through Ray on this machine with examples/hub/pack.py, for `npm run bench hub -- --whole`.

    hub_ray.py SCRATCH COUNT SHARDS K CPUS COMMAND...   Prints the seconds and what assemble printed.

The adapters are names only: COMMAND makes those that it is given, and deletes them.
"""
import json, os, pathlib, sys, time

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "examples" / "hub"))
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
import ray
from pack import pack

scratch, count, shards, k, cpus, *command = sys.argv[1:]
ray.init(num_cpus=int(cpus), include_dashboard=False, log_to_driver=False)
adapters = [str(pathlib.Path(scratch) / f"synthetic-{i:06}") for i in range(int(count))]
start = time.monotonic()
made = pack(adapters, str(pathlib.Path(scratch) / "tasks.eigen"), str(pathlib.Path(scratch) / "work"), command, shards=int(shards), k=int(k))
print(json.dumps({"seconds": time.monotonic() - start, "assemble": made, "ray": ray.__version__}))
ray.shutdown()
