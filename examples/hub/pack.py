"""Packs a hub of adapters on a Ray cluster: eigenlora's hub shard, merge, project or distill, and assemble as tasks (docs/hub.md).

    pip install ray
    python examples/hub/pack.py ADAPTERS -o tasks.eigen --work SHARED_FOLDER --shards 16 --k 32 [--address auto]

ADAPTERS and SHARED_FOLDER lie where every machine sees them under one name. Without --address a cluster is started on this
machine. With --model and --text every task is distilled. Nothing here knows of adapters: each task runs one command that reads
files and writes one. So a task that is lost with its machine is run again elsewhere, and the whole, run again, makes only the
parts that are missing.
"""
import argparse, json, pathlib, shlex, subprocess, sys
import ray


@ray.remote(num_cpus=1, max_retries=10)
def run(command, *needs):
    """Runs a command when the tasks it needs are done; gives back what it printed."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}: exit {done.returncode}\n{done.stdout}{done.stderr}")
    return json.loads(done.stdout)


def adapters_of(folder):
    """Folders of adapters, sorted, so that every run shares them out alike."""
    return sorted(str(config.parent) for config in pathlib.Path(folder).glob("*/adapter_config.json"))


def pack(adapters, output, work, eigenlora, shards=16, fan_in=8, k=32, dtype="f16", gauge="as-trained", rank=None, normalize=False, centering="keep", base=None, model=None, text=None, distill=()):
    """Starts all tasks at once; Ray runs each as soon as what it reads is there. Gives back what assemble printed."""
    work = pathlib.Path(work).absolute()
    work.mkdir(parents=True, exist_ok=True)

    def step(name, arguments, *needs):
        """A task that writes a file of the work folder, also in place of what a lost task or an earlier run has left there."""
        file = str(work / name)
        return file, run.remote([*eigenlora, *arguments, "-o", file, "--force", "--json"], *needs)

    def commands(parts):
        return [file for file, _ in parts], [task for _, task in parts]

    counted = ["--gauge", gauge, *(["--rank", str(rank)] if rank else []), *(["--normalize"] if normalize else [])]
    shares = [share for share in (adapters[i::shards] for i in range(shards)) if share]
    parts = [step(f"shard-{i}.part", ["hub", "shard", *share, *counted]) for i, share in enumerate(shares)]
    level = 0
    while len(parts) > fan_in:
        level += 1
        groups = [parts[i : i + fan_in] for i in range(0, len(parts), fan_in)]
        merges = [(commands(group), f"merge-{level}-{i}.part") for i, group in enumerate(groups)]
        parts = [step(name, ["hub", "merge", *files, "--part"], *tasks) for (files, tasks), name in merges]
    files, tasks = commands(parts)
    if base and pathlib.Path(base).exists():
        base = str(pathlib.Path(base).absolute())
    settings = ["--k", str(k), "--dtype", dtype, "--centering", centering, *(["--base", base] if base else [])]
    basis, based = step("basis.eigen", ["hub", "merge", *files, *settings], *tasks)
    # Distilling begins with projecting: both write parts with tasks.
    named = {"--model": model, "--text": text} if model else {}
    asked = [word for flag, path in named.items() for word in (flag, str(pathlib.Path(path).absolute()))]
    command = [*(["distill"] if model else ["hub", "project"]), basis, "--dtype", dtype, *(["--part"] if model else []), *asked, *distill]
    parts = [step(f"tasks-{i}.part", [*command, *share], based) for i, share in enumerate(shares)]
    files, tasks = commands(parts)
    target = str(pathlib.Path(output).absolute())
    return ray.get(run.remote([*eigenlora, "hub", "assemble", basis, *files, "-o", target, "--force", "--json"], *tasks))


if __name__ == "__main__":
    cli = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    cli.add_argument("adapters", help="a folder of adapters' folders")
    cli.add_argument("-o", "--output", required=True, help="the pack to write")
    cli.add_argument("--force", action="store_true", help="replace an existing pack")
    cli.add_argument("--work", required=True, help="a folder for parts, seen by all machines; a rerun finds them there")
    cli.add_argument("--shards", type=int, default=16, help="how many parts: several for each worker")
    cli.add_argument("--fan-in", type=int, default=8, help="parts that one merge reads")
    cli.add_argument("--k", type=int, default=32)
    cli.add_argument("--dtype", default="f16")
    cli.add_argument("--gauge", default="as-trained")
    cli.add_argument("--rank", type=int, help="of a balanced pair, its strongest directions")
    cli.add_argument("--normalize", action="store_true", help="every task counts alike")
    cli.add_argument("--centering", default="keep")
    cli.add_argument("--base", help="base model, for fingerprints")
    cli.add_argument("--model", help="MODEL.onnx: distil every task (eigenlora distill); needs --text")
    cli.add_argument("--text", help="plain text like that of the tasks, one per line")
    cli.add_argument("--distill", type=shlex.split, default=[], help="more options of eigenlora distill, as one word")
    cli.add_argument("--address", help="of a Ray cluster; auto finds one that runs")
    cli.add_argument("--eigenlora", default="npx eigenlora", help="how the command line is started on a worker")
    given = vars(cli.parse_args())
    if (given["model"] is None) != (given["text"] is None):
        sys.exit("--model and --text belong together")
    if pathlib.Path(given["output"]).exists() and not given["force"]:
        sys.exit(f"{given['output']} already exists; choose another name, or replace it with --force")
    del given["force"]
    ray.init(address=given.pop("address"))
    folder = pathlib.Path(given.pop("adapters")).absolute()
    print(json.dumps(pack(adapters_of(folder), eigenlora=shlex.split(given.pop("eigenlora")), **given)))
