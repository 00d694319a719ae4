"""A pack written from SPEC.md alone, with every number format and every kind of term, and the values a reader must find.

usage: make_pack_golden.py OUT_DIR      (needs numpy, msgpack, safetensors)
OUT/every-kind.eigen, OUT/every-kind.task (its last task as a task file), OUT/every-kind.safetensors:
  <task>/<module>/delta [out, in] f64 as f32, <task>/<module>/magnitude, <task>/<parameter>
Nothing here comes from the reader's code: the CRC is bitwise, tensors are packed bit by bit, sums are f64.
"""
import hashlib, pathlib, struct, sys
import msgpack, numpy as np
from safetensors.numpy import save_file

OUT = pathlib.Path(sys.argv[1]); OUT.mkdir(parents=True, exist_ok=True)
rng = np.random.default_rng(7)
TYPES = ["f32", "f16", "bf16", "int8", "int4", "int3"]
BITS = {"int8": 8, "int4": 4, "int3": 3}

def crc32c(data):
    c = 0xFFFFFFFF
    for byte in data:
        c ^= byte
        for _ in range(8): c = (c >> 1) ^ (0x82F63B78 if c & 1 else 0)
    return c ^ 0xFFFFFFFF
assert crc32c(b"123456789") == 0xE3069283

def align(n, a): return -(-n // a) * a
def to_bf16(x):
    u = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype(np.uint16)

def tensor(kind, x):
    """Encoded bytes and the values they mean."""
    x = np.atleast_2d(np.asarray(x, dtype=np.float64)); rows, width = x.shape
    if kind == "f32": v = x.astype("<f4"); raw, val = v.tobytes(), v.astype(np.float64)
    elif kind == "f16": v = x.astype("<f2"); raw, val = v.tobytes(), v.astype(np.float64)
    elif kind == "bf16":
        h = to_bf16(x); raw = h.astype("<u2").tobytes(); val = (h.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    else:
        b = BITS[kind]; top = 2 ** (b - 1) - 1
        scale = (np.abs(x).max(1) / top).astype(np.float16)
        scale = np.where(scale.astype(np.float64) * top < np.abs(x).max(1), np.nextafter(scale, np.float16(np.inf)), scale)
        q = np.clip(np.rint(np.divide(x, scale.astype(np.float64)[:, None], where=scale[:, None] != 0, out=np.zeros_like(x))), -top, top).astype(int)
        raw = scale.astype("<f2").tobytes(); raw += b"\0" * (align(len(raw), 4) - len(raw))
        for row in q:
            bits = [(int(v) >> j) & 1 for v in row for j in range(b)]; bits += [0] * (-len(bits) % 8)
            raw += bytes(sum(bits[8 * i + j] << j for j in range(8)) for i in range(len(bits) // 8))
        val = q * scale.astype(np.float64)[:, None]
    return raw + b"\0" * (align(len(raw), 4) - len(raw)), val

# ---- basis: one module per number format, plus a flat one, one without a mean, one without any basis
modules, parts, basis = [], b"", {}
def add(name, out, inn, kind, typ, K, mean, layout=0, rank=None, kernel=None):
    global parts
    m = {"name": name, "out": out, "in": inn, "layout": layout}
    if kernel: m["kernel"] = kernel
    for side, d in (("A", inn), ("B", out)):
        if kind == 0: m[side] = None; continue
        w = d * (rank or 1)
        raw, val = tensor(typ, rng.standard_normal((K + mean, w)) / np.sqrt(w))
        parts += b"\0" * (align(len(parts), 16) - len(parts)) + raw
        s = {"kind": kind, "K": K, "mean": bool(mean), "type": TYPES.index(typ), "explained": 0.5}
        if kind == 2: s["rank"] = rank
        m[side] = s; basis[name, side] = (val, K, mean, d)
    modules.append(m)
for t in TYPES: add(f"layers.{TYPES.index(t)}.{t}", 13, 10, 1, t, 5, 1)
add("layers.6.flat", 9, 7, 2, "f16", 3, 1, rank=2)
add("layers.7.flat", 9, 7, 2, "int4", 4, 0, rank=3)
add("layers.8.no_mean", 6, 11, 1, "f32", 4, 0, layout=1)
add("layers.9.private", 8, 8, 0, None, 0, 0)
add("layers.10.conv", 5, 12, 1, "f16", 3, 1, layout=2, kernel=[2, 2])
add("embeddings.word", 6, 20, 1, "bf16", 3, 1, layout=3)
description = msgpack.packb({"producer": "make_pack_golden.py", "mode": "mixed", "gauge": "as-trained", "centering": "keep", "baseModel": None, "modules": modules, "unknown key": [1, 2]})
bases = parts

# ---- tasks
golden = {}
def blob(task, terms, parameters):
    """terms: name -> (rank, coefficient type, use mean A, use mean B, q, private type, magnitude type)"""
    head, tensors = [], []
    for i, m in enumerate(modules):
        if m["name"] not in terms: continue
        r, typ, ma, mb, q, pt, mt = terms[m["name"]]
        A = np.zeros((0, m["in"])); Bt = np.zeros((0, m["out"])); codes = []
        for side, use in (("A", ma), ("B", mb)):
            if not typ: codes.append(None); continue
            E, K, mean, d = basis[m["name"], side]; kind = m[side]["kind"]
            raw, alpha = tensor(typ, rng.standard_normal((r if kind == 1 else 1, K))); tensors.append(raw)
            x = alpha @ E[:K] + (E[K] if use else 0); x = x.reshape(-1, d)
            if side == "A": A = x
            else: Bt = x
            codes.append(kind + (4 if use else 0) + 8 * TYPES.index(typ))
        if q:
            ra, va = tensor(pt, rng.standard_normal((q, m["in"]))); rb, vb = tensor(pt, rng.standard_normal((q, m["out"])))
            tensors += [ra, rb]; A = np.vstack([A, va]); Bt = np.vstack([Bt, vb])
        if mt:
            raw, v = tensor(mt, np.abs(rng.standard_normal(m["out"])) + 1); tensors.append(raw); golden[f"{task}/{m['name']}/magnitude"] = v[0].astype(np.float32)
        golden[f"{task}/{m['name']}/delta"] = (Bt.T @ A).astype(np.float32)
        head.append([i, r if typ else 0, *codes, q, TYPES.index(pt) if q else 0, TYPES.index(mt) if mt else None])
    params = []
    for name, role, typ, shape, indices in parameters:
        x = rng.standard_normal(shape); raw, v = tensor(typ, x.reshape(shape[0], -1) if len(shape) > 1 else x[None]); tensors.append(raw)
        golden[f"{task}/{name}"] = v.reshape(shape).astype(np.float32)
        params.append([name, role, TYPES.index(typ), list(shape)] + ([indices] if indices else []))
    h = msgpack.packb([head, params]); b = struct.pack("<II", 0x4B534154, len(h)) + h
    for raw in tensors: b += b"\0" * (align(len(b), 4) - len(b)) + raw
    return b

names = [m["name"] for m in modules]
all_f16 = {n: (3 if "flat" not in n else (2 if "6" in n else 3), "f16", 1, 1, 0, None, None) for n in names if "private" not in n}
all_f16["layers.7.flat"] = (3, "f16", 0, 0, 0, None, None); all_f16["layers.8.no_mean"] = (4, "f16", 0, 0, 0, None, None)
mixed = {}
for i, n in enumerate(names[:6]): mixed[n] = (i + 1, TYPES[(i + 2) % 6], i % 2, (i + 1) % 2, i % 3, TYPES[i], None)
mixed["layers.6.flat"] = (2, "int8", 1, 0, 2, "int4", None)
mixed["layers.8.no_mean"] = (2, "int3", 0, 0, 0, None, "f32")
mixed["layers.9.private"] = (0, None, 0, 0, 3, "int8", None)
tasks = {
    "all": blob("all", all_f16, []),
    "mixed": blob("mixed", mixed, [("classifier.weight", 0, "int8", (4, 8), None), ("classifier.bias", 0, "f16", (4,), None)]),
    "parameters": blob("parameters", {}, [("head.weight", 0, "int4", (3, 2, 5), None), ("layers.0.f32.bias", 1, "f32", (13,), None),
                       ("layers.1.f16.bias", 2, "bf16", (13,), None), ("embeddings.word.weight", 3, "int3", (2, 6), [3, 17])]),
}
entries = {t: {"id": t, "adapterBytes": 1000, "metadata": {"labels": ["ja", "nein"], "nested": {"__proto__": 1, "n": None}}} for t in tasks}
entries["all"].pop("metadata")
tasklist = msgpack.packb(list(entries.values()))

# ---- file
n = 1 + len(tasks); dlen = 16 + 32 * n + len(description) + len(tasklist); doff = 1536
boff = align(doff + dlen, 64); end = boff + len(bases); sections = [(1, boff, bases)]
for b in tasks.values(): off = align(end, 64); sections.append((2, off, b)); end = off + len(b)
directory = struct.pack("<IIII", n, len(description), len(tasklist), 0)
for kind, off, b in sections: directory += struct.pack("<IIQQII", kind, 1, off, len(b), crc32c(b), 0)
directory += description + tasklist; assert len(directory) == dlen
basis_id = hashlib.sha256(description + bases).digest()
head = b"\x89EIGEN\r\n" + struct.pack("<HHI", 1, 0, 1536) + basis_id; head += struct.pack("<I", crc32c(head))
sb = struct.pack("<QQQQQQIII", 1, end, doff, dlen, boff, len(bases), crc32c(directory), 0, 0); sb += struct.pack("<I", crc32c(sb))
f = bytearray(end); f[:len(head)] = head; f[1024:1088] = sb; f[doff:doff + dlen] = directory
for _, off, b in sections: f[off:off + len(b)] = b
(OUT / "every-kind.eigen").write_bytes(f)
last = list(tasks)[-1]; entry = msgpack.packb(entries[last]); b = tasks[last]
h = b"\x89ETASK\r\n" + struct.pack("<HHI", 1, 0, len(entry)) + basis_id + struct.pack("<III", len(b), crc32c(entry), crc32c(b)); h += struct.pack("<I", crc32c(h))
h += entry; h += b"\0" * (align(len(h), 64) - len(h)); (OUT / "every-kind.task").write_bytes(h + b)
save_file(golden, OUT / "every-kind.safetensors")
print(len(f), "bytes,", len(golden), "values")
