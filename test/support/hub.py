"""A real Ray cluster on this machine packs adapters with examples/hub/pack.py, and loses a worker in the middle.

    hub.py ADAPTERS OUT WORK MODEL TEXT EIGENLORA...   Writes WORK/report.json: what assemble printed, and how the kill went.

Two of the adapters are distilled by MODEL and TEXT afterwards, into OUT.distilled.

A head without CPUs and two workers of one CPU each. The first command that makes shard 3 waits for the end of its worker, which
gets SIGKILL meanwhile; the other worker does the rest.
"""
import json, os, pathlib, sys, threading, time

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "examples" / "hub"))

if sys.argv[1] == "--wait":
    # Stands in for eigenlora on a worker: the first of its kind waits for the end of the worker that started it.
    marker, *command = sys.argv[2:]
    if any(word.endswith("shard-3.part") for word in command):
        try:
            with open(marker, "x") as file:
                file.write(os.environ["RAY_RAYLET_PID"])
        except FileExistsError:
            pass
        else:
            parent = os.getppid()
            while os.getppid() == parent:
                time.sleep(0.05)
            sys.exit(1)
    os.execvp(command[0], command)

import ray
from ray.cluster_utils import Cluster
from pack import adapters_of, pack

adapters, out, work, model, text, shards, *eigenlora = sys.argv[1:]
marker = pathlib.Path(work) / "killed"
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
workers = [cluster.add_node(num_cpus=1) for _ in range(2)]
ray.init(address=cluster.address, log_to_driver=False)
report = {"workers": len([node for node in ray.nodes() if node["Resources"].get("CPU")])}


def kill():
    while not (marker.exists() and marker.read_text()):
        time.sleep(0.05)
    report["parts"] = len(list(pathlib.Path(work).glob("shard-*.part")))
    raylet = int(marker.read_text())
    (worker,) = [node for node in workers if node.all_processes["raylet"][0].process.pid == raylet]
    process = worker.all_processes["raylet"][0].process
    cluster.remove_node(worker, allow_graceful=False)
    report["signal"] = -process.wait(30)


def dead():
    return len([node for node in ray.nodes() if not node["Alive"]])


killing = threading.Thread(target=kill, daemon=True)
killing.start()
waiting = [sys.executable, __file__, "--wait", str(marker), *eigenlora]
report["pack"] = pack(adapters_of(adapters), out, work, waiting, shards=int(shards), fan_in=3, k=32, dtype="f32")
killing.join(60)
# Ray's list of nodes hears of it some time after the process is gone.
until = time.monotonic() + 60
while dead() == 0 and time.monotonic() < until:
    time.sleep(0.1)
report["dead"] = dead()
short = ["--steps", "2", "--batch", "4", "--tokens", "32"]
report["distilled"] = pack(adapters_of(adapters)[:2], f"{out}.distilled", f"{work}/distilled", eigenlora, shards=2, k=2, model=model, text=text, distill=short)
# Not printed: Ray itself writes to the same output, from other threads.
(pathlib.Path(work) / "report.json").write_text(json.dumps(report))
ray.shutdown()
cluster.shutdown()
