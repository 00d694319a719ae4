"""What the tensors of adapter files mean, computed without this project's code: names mapped by hand, ΔW in f64 by numpy.

usage: wild-oracle.py FOLDER FACTORS
 FOLDER:  folders of adapters, of diffusers (pytorch_lora_weights.safetensors) or PEFT (adapter_config.json)
 FACTORS: for each, ID.safetensors with "MODULE A" [rank, in] and "MODULE Bt" [rank, out]
prints {id: {modules, norm, worst}}: ‖ΔW‖ over all modules, and the largest ‖ΔW − Btᵀ·A‖ / ‖ΔW‖ of a module
"""

import json
import pathlib
import sys

import numpy as np
from safetensors.numpy import load_file

CLIP = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "out_proj"}


def tensors(path):
    """As f64. numpy has no bfloat16: its bits are the upper half of an f32's."""
    file = path.read_bytes()
    start = 8 + int.from_bytes(file[:8], "little")
    found = {}
    for name, entry in json.loads(file[8:start]).items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        raw = file[start + begin : start + end]
        if entry["dtype"] == "BF16":
            values = (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:
            values = np.frombuffer(raw, {"F32": np.float32, "F16": np.float16, "F64": np.float64}[entry["dtype"]])
        found[name] = values.astype(np.float64).reshape(entry["shape"])
    return found


def diffusers(folder):
    """{module: (A, B, scale)}"""
    state = tensors(folder / "pytorch_lora_weights.safetensors")
    modules = {}
    for key, a in state.items():
        bare = key.split(".")[0] not in ("unet", "text_encoder", "text_encoder_2", "transformer")
        name = "unet." + key if bare else key
        for down in (".lora_A.weight", "_lora.down.weight", ".lora.down.weight", ".lora_linear_layer.down.weight"):
            if not name.endswith(down):
                continue
            module = name[: -len(down)].replace(".processor", "")
            if down == "_lora.down.weight":
                owner, projection = module.rsplit(".to_", 1)
                if name.startswith("text_encoder"):
                    module = owner + "." + CLIP[projection]
                else:
                    module = owner + ".to_" + ("out.0" if projection == "out" else projection)
            up = key[: -len(down)] + down.replace("lora_A", "lora_B").replace("down", "up")
            assert module not in modules
            modules[module] = (a, state[up], 1.0)
            break
    assert 2 * len(modules) == len(state), "a tensor was not understood"
    return modules


def peft(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    assert not config.get("rank_pattern") and not config.get("alpha_pattern") and not config.get("use_dora")
    rank = config["r"]
    scale = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
    state = tensors(folder / "adapter_model.safetensors")
    modules = {}
    for name, a in state.items():
        if name.endswith(".lora_A.weight"):
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            modules[module] = (a, state[name.replace("lora_A", "lora_B")], scale)
    return modules


def flat(matrix):
    return matrix.reshape(matrix.shape[0], -1)


result = {}
for folder in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    expected = peft(folder) if (folder / "adapter_config.json").exists() else diffusers(folder)
    found = load_file(pathlib.Path(sys.argv[2]) / f"{folder.name}.safetensors")
    names = {name.rsplit(" ", 1)[0] for name in found}
    assert names == set(expected), sorted(names ^ set(expected))[:4]
    worst, square = 0.0, 0.0
    for module, (a, b, scale) in expected.items():
        delta = scale * flat(b) @ flat(a)
        ours = found[f"{module} Bt"].astype(np.float64).T @ found[f"{module} A"].astype(np.float64)
        norm = np.linalg.norm(delta)
        square += norm**2
        worst = max(worst, float(np.linalg.norm(delta - ours) / norm) if norm > 0 else float(np.abs(ours).max()))
    result[folder.name] = {"modules": len(expected), "norm": square**0.5, "worst": worst}
print(json.dumps(result))
