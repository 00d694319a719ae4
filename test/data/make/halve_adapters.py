"""Store a suite of PEFT adapters with f16 tensors, in place, to halve its size.  usage: halve_adapters.py SUITE_DIR"""
import pathlib, sys, numpy as np
from safetensors.numpy import load_file, save_file
for f in sorted(pathlib.Path(sys.argv[1]).glob("*/adapter_model.safetensors")):
    save_file({k: v.astype(np.float16) for k, v in load_file(f).items()}, f, metadata={"format": "pt"})
