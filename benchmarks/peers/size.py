"""Other packages compress the same adapters and give them back.  usage: size.py   Prints their versions, then answers each line
{"package", "k", "packed", "adapters": [folder], "out": folder} with {"bytes": of the files it saved}; the adapters it gives back lie
in out/back/NAME. Adapters stored as f16 are given as f32, since one of them computes in what it is given."""
import json, logging, pathlib, shutil, sys, warnings
warnings.filterwarnings("ignore"); logging.disable(logging.WARNING)
import torch; torch.set_num_threads(1)
from importlib.metadata import version
from safetensors.torch import load_file, save_file
import lorashare, vlora


def whole(folder, into):
    into.mkdir(parents=True)
    shutil.copy(pathlib.Path(folder) / "adapter_config.json", into)
    tensors = load_file(pathlib.Path(folder) / "adapter_model.safetensors")
    save_file({k: v.float() for k, v in tensors.items()}, into / "adapter_model.safetensors")
    return str(into)


def with_lorashare(q, folders, saved, back):
    lorashare.SHAREModel.from_adapters(folders, num_components=q["k"]).save_pretrained(saved)
    model = lorashare.SHAREModel.from_pretrained(saved)
    for name in model.all_loadings: model.reconstruct(name, back / name)


def with_vlora(q, folders, saved, back):
    loaded = [vlora.load_adapter(f) for f in folders]; ids = [pathlib.Path(f).name for f in folders]
    space = vlora.SharedSubspace.from_adapters(loaded, task_ids=ids, num_components=q["k"])
    (space.save_quantized if q.get("packed") else space.save)(saved)
    space = vlora.SharedSubspace.load(saved)
    for id, one in zip(ids, loaded):
        weights = space.reconstruct(id); weights.metadata = one.metadata
        vlora.save_adapter(weights, back / id)


print(json.dumps({p: f"{version(p)}, torch {torch.__version__}" for p in ("lorashare", "vlora-dev")}), flush=True)
for line in sys.stdin:
    q = json.loads(line); out = pathlib.Path(q["out"]); shutil.rmtree(out, ignore_errors=True)
    folders = [whole(f, out / "given" / pathlib.Path(f).name) for f in q["adapters"]]
    {"lorashare": with_lorashare, "vlora": with_vlora}[q["package"]](q, folders, out / "saved", out / "back")
    print(json.dumps({"bytes": sum(f.stat().st_size for f in (out / "saved").rglob("*") if f.is_file())}), flush=True)
