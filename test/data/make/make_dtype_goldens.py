"""Number formats by numpy and torch.  usage: make_dtype_goldens.py OUT.safetensors
`half` [65536]: the f32 value of every f16 bit pattern; `values`: f32 with ties, subnormals, overflow; `f16`, `bf16`: their bits, rounded to nearest even."""
import sys, numpy as np, torch
from safetensors.numpy import save_file
half = np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32)
rng = np.random.default_rng(3); fin = half[np.isfinite(half)]
with np.errstate(all="ignore"):
    ties = ((fin.astype(np.float64) + np.nextafter(fin.astype(np.float16), np.float16(np.inf)).astype(np.float64)) / 2).astype(np.float32)
    v = np.concatenate([ties[rng.integers(0, len(ties), 4000)], np.nextafter(ties[:2000], np.float32(np.inf)), np.nextafter(ties[:2000], np.float32(-np.inf)),
        rng.standard_normal(2000).astype(np.float32) * 10.0 ** rng.integers(-12, 8, 2000), rng.integers(0, 2**32, 4000, dtype=np.uint32).view(np.float32),
        np.array([0, -0.0, 65504, 65519.99, 65520, -65520, 2**-24, 2**-25, 1.5 * 2**-25, 6.1e-5, np.inf, -np.inf, 3.3895e38, 3.4028e38], np.float32)])
    v = v[~np.isnan(v)].astype(np.float32); f16 = v.astype(np.float16).view(np.uint16)
bf16 = torch.from_numpy(v).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
save_file({"half": half, "values": v, "f16": f16, "bf16": bf16}, sys.argv[1])
