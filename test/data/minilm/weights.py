"""weights.json: name -> [shape, SHA-256 of the f16 bytes] of every tensor of the checkpoint behind model_fp16.onnx.

usage: python weights.py model.safetensors > weights.json
"""
import hashlib, json, sys
from safetensors.numpy import load_file

tensors = load_file(sys.argv[1])
digest = lambda a: json.dumps([list(a.shape), hashlib.sha256(a.tobytes()).hexdigest()])
rows = [f'"{name}": {digest(a)}' for name, a in sorted(tensors.items())]
print("{\n" + ",\n".join(rows) + "\n}")
