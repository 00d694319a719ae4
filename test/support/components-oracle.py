"""Components as Python reads them, and how far tasks lie from their span.

usage: components-oracle.py FOLDER
FOLDER: NAME.safetensors of `export --components`, and beside it the folder NAME, a task of the same pack as a PEFT adapter. Prints
{NAME: {"about", "shapes", "off"}}: off is the largest residual of a factor's rows about the mean, as a share of the rows, by least squares in
f64. Exits with 3 when numpy or safetensors cannot be imported.
"""
import json, sys
from pathlib import Path

try:
    import numpy as np
    from safetensors import safe_open
    from safetensors.numpy import load_file
except ImportError as missing:
    print(missing, file=sys.stderr)
    sys.exit(3)

found = {}
for file in sorted(Path(sys.argv[1]).glob("*.safetensors")):
    with safe_open(file, "numpy") as opened:
        about = opened.metadata()
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}
    adapter = load_file(file.with_suffix("") / "adapter_model.safetensors")
    off = 0.0
    for name, E in tensors.items():
        module, side, part = name.rsplit(".", 2)
        if part != "components":
            continue
        E = E.astype(np.float64)
        mean = tensors.get(f"{module}.{side}.mean", np.zeros(E.shape[1:])).astype(np.float64)
        factor = adapter[f"base_model.model.{module}.lora_{side}.weight"].astype(np.float64)
        rows = factor.T if side == "B" else factor
        rows = rows.reshape(-1, mean.size)
        x, flat = rows - mean.reshape(-1), E.reshape(len(E), -1)
        rest = x - np.linalg.lstsq(flat.T, x.T, rcond=None)[0].T @ flat
        off = max(off, float(np.linalg.norm(rest) / np.linalg.norm(rows)))
    shapes = {name: list(value.shape) for name, value in tensors.items()}
    found[file.stem] = {"about": about, "shapes": shapes, "off": off}
print(json.dumps(found))
