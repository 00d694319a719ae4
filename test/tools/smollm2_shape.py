"""The shape of SmolLM2-135M-Instruct, for smollm2.py and smollm2_onnx.py."""
LAYERS, WIDTH, HIDDEN, HEADS, KV_HEADS, HEAD, VOCABULARY = 30, 576, 1536, 9, 3, 64, 49152
# Values that share a scale in its 4-bit file.
BLOCK = 32
THETA, EPSILON = 100000.0, 9.999999747378752e-06
