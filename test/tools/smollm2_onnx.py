"""ONNX files of SmolLM2 for smollm2.py: a decoder with KV cache in standard operators (opset 17), node by node.

Inputs and outputs are those of transformers.js' decoders:
input_ids [batch, new], attention_mask [batch, past + new], position_ids [batch, new], past_key_values.N.key and .value
[batch, 3, past, 64] -> logits [batch, new, 49152], present.N.key and .value [batch, 3, past + new, 64].
Weights bear transformers' names and lie as [in, out].
"""
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from smollm2_shape import BLOCK, EPSILON, HEAD, HEADS, KV_HEADS, LAYERS, THETA, VOCABULARY, WIDTH

# "The capital of France is", and what torch 2.13 with transformers 5.24 answers from model.safetensors in f32: the five
# largest logits of the next token.
PROMPT = [504, 3575, 282, 4649, 314]
TOP = {7042: 17.3786, 260: 14.8999, 4528: 13.2503, 2250: 13.0135, 1315: 12.9588}
# Tolerances by form. The blocks of q4 are not rounded to f16 as the weights of the others are.
TOLERANCE = {"f32": 1e-3, "f16": 1e-3, "q4": 0.1}


class Graph:
    """Nodes and constants, in the order of their use."""

    def __init__(self, weights, form, nibbles):
        self.weights, self.form, self.nibbles = weights, form, nibbles
        self.nodes, self.constants = [], []

    def const(self, name, value):
        self.constants.append(numpy_helper.from_array(np.array(value, order="C"), name))
        return name

    def ints(self, name, *values):
        return self.const(name, np.array(values, np.int64))

    def node(self, operator, inputs, output, **attributes):
        self.nodes.append(helper.make_node(operator, inputs, [output], name=f"/{output}", **attributes))
        return output

    def weight(self, name, value=None):
        """A weight as f32, whatever it is stored in."""
        value = self.weights[name] if value is None else value
        # Norms are small, and a Cast apiece is not worth it in q4.
        if self.form == "f32" or (self.form == "q4" and value.ndim == 1):
            return self.const(name, value.astype(np.float32))
        return self.node("Cast", [self.const(f"{name}_f16", value)], name, to=TensorProto.FLOAT)

    def linear(self, x, module):
        name, output = f"{module}.weight", f"{module.replace('.self_attn.', '/self_attn/').replace('.mlp.', '/mlp/')}/MatMul_out"
        if self.form != "q4":
            return self.node("MatMul", [x, self.weight(name, self.weights[name].T)], output)
        values, scales, zeros = self.nibbles(name)
        rows, columns = self.weights[name].shape
        inputs = [x, self.const(f"{name}_Q4", values), self.const(f"{name}_scales", scales), self.const(f"{name}_zero_points", zeros)]
        return self.node("MatMulNBits", inputs, output, domain="com.microsoft", K=columns, N=rows, bits=4, block_size=BLOCK)

    def norm(self, x, module):
        at = module.replace(".", "/")
        mean = self.node("ReduceMean", [self.node("Pow", [x, "two"], f"{at}/squared")], f"{at}/mean", axes=[-1], keepdims=1)
        root = self.node("Sqrt", [self.node("Add", [mean, "epsilon"], f"{at}/above_zero")], f"{at}/root")
        return self.node("Mul", [self.weight(f"{module}.weight"), self.node("Div", [x, root], f"{at}/unit")], f"{at}/out")

    def heads(self, x, count, at):
        """[batch, new, heads * 64] as [batch, heads, new, 64]."""
        return self.node("Transpose", [self.node("Reshape", [x, f"split_{count}"], f"{at}/split")], f"{at}/heads", perm=[0, 2, 1, 3])

    def rotate(self, x, at):
        first = self.node("Slice", [x, "from_0", "to_half", "axis_3"], f"{at}/first")
        second = self.node("Slice", [x, "to_half", "to_end", "axis_3"], f"{at}/second")
        turned = self.node("Concat", [self.node("Neg", [second], f"{at}/minus"), first], f"{at}/turned", axis=-1)
        return self.node("Add", [self.node("Mul", [x, "cos"], f"{at}/cos"), self.node("Mul", [turned, "sin"], f"{at}/sin")], f"{at}/out")


def shared(graph):
    """What every layer uses: shapes, the rotary tables, the mask."""
    for name, values in {
        "from_0": [0], "to_half": [HEAD // 2], "to_end": [HEAD], "axis_1": [1], "axis_2": [2], "axis_3": [3],
        f"split_{HEADS}": [0, 0, HEADS, HEAD], f"split_{KV_HEADS}": [0, 0, KV_HEADS, HEAD], "joined": [0, 0, WIDTH],
        "by_group": [0, KV_HEADS, -1, HEAD], "by_head": [0, HEADS, -1, HEAD], "heads_new": [0, HEADS, -1], "groups_new": [0, KV_HEADS, -1],
    }.items():
        graph.ints(name, *values)
    for name, value in {"zero": 0, "two": 2, "epsilon": EPSILON, "scale": HEAD ** -0.5, "least": np.finfo(np.float32).min}.items():
        graph.const(name, np.float32(value))
    graph.const("start", np.int64(0)), graph.const("one", np.int64(1))
    frequencies = 1 / THETA ** (np.arange(0, HEAD, 2, dtype=np.float64) / HEAD)
    graph.const("frequencies", frequencies.astype(np.float32)[None, None])

    places = graph.node("Unsqueeze", [graph.node("Cast", ["position_ids"], "places", to=TensorProto.FLOAT), "axis_2"], "places_each")
    angles = graph.node("Mul", [places, "frequencies"], "angles_half")
    angles = graph.node("Unsqueeze", [graph.node("Concat", [angles, angles], "angles", axis=-1), "axis_1"], "angles_each")
    graph.node("Cos", [angles], "cos"), graph.node("Sin", [angles], "sin")

    # A new token sees what is not masked, up to itself.
    total = graph.node("Gather", [graph.node("Shape", ["attention_mask"], "mask_shape"), "one"], "total", axis=0)
    new = graph.node("Gather", [graph.node("Shape", ["input_ids"], "ids_shape"), "one"], "new", axis=0)
    rows = graph.node("Range", [graph.node("Sub", [total, new], "past"), total, "one"], "rows")
    columns = graph.node("Unsqueeze", [graph.node("Range", ["start", total, "one"], "columns"), "from_0"], "columns_each")
    causal = graph.node("LessOrEqual", [columns, graph.node("Unsqueeze", [rows, "axis_1"], "rows_each")], "causal")
    seen = graph.node("Unsqueeze", [graph.node("Cast", ["attention_mask"], "seen", to=TensorProto.BOOL), "axis_1"], "seen_rows")
    allowed = graph.node("And", [causal, graph.node("Unsqueeze", [seen, "axis_2"], "seen_each")], "allowed")
    graph.node("Where", [allowed, "zero", "least"], "mask")
    length = graph.node("Unsqueeze", [total, "from_0"], "total_each")
    graph.node("Concat", ["heads_new", length], "scores_by_head", axis=0)
    graph.node("Concat", ["groups_new", length], "scores_by_group", axis=0)


def attention(graph, x, layer):
    """Three heads of keys serve three heads of queries each: queries of a group lie below each other, so keys are not repeated."""
    module = f"model.layers.{layer}.self_attn"
    at = f"model.layers.{layer}/self_attn"
    query, key, value = (graph.linear(x, f"{module}.{part}_proj") for part in "qkv")
    query = graph.rotate(graph.heads(query, HEADS, f"{at}/q"), f"{at}/rotated_q")
    key = graph.rotate(graph.heads(key, KV_HEADS, f"{at}/k"), f"{at}/rotated_k")
    value = graph.heads(value, KV_HEADS, f"{at}/v")
    key = graph.node("Concat", [f"past_key_values.{layer}.key", key], f"present.{layer}.key", axis=2)
    value = graph.node("Concat", [f"past_key_values.{layer}.value", value], f"present.{layer}.value", axis=2)
    query = graph.node("Mul", [graph.node("Reshape", [query, "by_group"], f"{at}/q_by_group"), "scale"], f"{at}/q_scaled")
    scores = graph.node("MatMul", [query, graph.node("Transpose", [key], f"{at}/k_turned", perm=[0, 1, 3, 2])], f"{at}/scores_by_group")
    scores = graph.node("Add", [graph.node("Reshape", [scores, "scores_by_head"], f"{at}/scores"), "mask"], f"{at}/masked")
    weights = graph.node("Reshape", [graph.node("Softmax", [scores], f"{at}/weights", axis=-1), "scores_by_group"], f"{at}/weights_by_group")
    mixed = graph.node("Reshape", [graph.node("MatMul", [weights, value], f"{at}/mixed_by_group"), "by_head"], f"{at}/mixed")
    mixed = graph.node("Reshape", [graph.node("Transpose", [mixed], f"{at}/mixed_turned", perm=[0, 2, 1, 3]), "joined"], f"{at}/joined")
    return graph.linear(mixed, f"{module}.o_proj")


def feed_forward(graph, x, layer):
    module, at = f"model.layers.{layer}.mlp", f"model.layers.{layer}/mlp"
    gate, up = graph.linear(x, f"{module}.gate_proj"), graph.linear(x, f"{module}.up_proj")
    gate = graph.node("Mul", [gate, graph.node("Sigmoid", [gate], f"{at}/sigmoid")], f"{at}/silu")
    return graph.linear(graph.node("Mul", [gate, up], f"{at}/gated"), f"{module}.down_proj")


def write(path, weights, form, nibbles):
    """
    weights: f16 arrays [out, in] by transformers' names. form: "f32", "f16" or "q4". nibbles(name): the layer's 4-bit values,
    scales and zero points.
    """
    graph = Graph(weights, form, nibbles)
    shared(graph)
    embedding = graph.weight("model.embed_tokens.weight")
    x = graph.node("Gather", [embedding, "input_ids"], "embedded")
    for layer in range(LAYERS):
        module = f"model.layers.{layer}"
        x = graph.node("Add", [x, attention(graph, graph.norm(x, f"{module}.input_layernorm"), layer)], f"{module}/after_attention")
        x = graph.node("Add", [x, feed_forward(graph, graph.norm(x, f"{module}.post_attention_layernorm"), layer)], f"{module}/out")
    x = graph.norm(x, "model.norm")
    # The head is the embedding.
    graph.node("MatMul", [x, graph.node("Transpose", [embedding], "lm_head.weight", perm=[1, 0])], "logits")

    info = helper.make_tensor_value_info
    inputs = [info(name, TensorProto.INT64, ["batch_size", length]) for name, length in (
        ("input_ids", "sequence_length"), ("attention_mask", "total_sequence_length"), ("position_ids", "sequence_length"))]
    outputs = [info("logits", TensorProto.FLOAT, ["batch_size", "sequence_length", VOCABULARY])]
    for name in (f"{layer}.{part}" for layer in range(LAYERS) for part in ("key", "value")):
        for there, prefix, length in ((inputs, "past_key_values", "past_sequence_length"), (outputs, "present", "total_sequence_length")):
            there.append(info(f"{prefix}.{name}", TensorProto.FLOAT, ["batch_size", KV_HEADS, length, HEAD]))
    opsets = [helper.make_opsetid("", 17)] + ([helper.make_opsetid("com.microsoft", 1)] if form == "q4" else [])
    proto = helper.make_graph(graph.nodes, "smollm2-135m-instruct", inputs, outputs, graph.constants)
    onnx.save(helper.make_model(proto, opset_imports=opsets, producer_name="smollm2.py", ir_version=9), path)


def check(path, form):
    """Stops unless the file answers as torch does: at once, token by token with the cache, and padded on the left in a batch."""
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(ids, mask, past):
        places = np.maximum(np.cumsum(mask, 1) - 1, 0)[:, -len(ids[0]):]
        feeds = {"input_ids": np.array(ids, np.int64), "attention_mask": np.array(mask, np.int64), "position_ids": places.astype(np.int64)}
        for layer in range(LAYERS):
            for part in ("key", "value"):
                empty = np.zeros((len(ids), KV_HEADS, 0, HEAD), np.float32)
                feeds[f"past_key_values.{layer}.{part}"] = past.get(f"present.{layer}.{part}", empty)
        found = dict(zip(names, session.run(None, feeds)))
        return found.pop("logits")[-1, -1], found

    count = len(PROMPT)
    ways = {"at once": run([PROMPT], [[1] * count], {})[0]}
    past = {}
    for place, token in enumerate(PROMPT):
        ways["with a cache"], past = run([[token]], [[1] * (place + 1)], past)
    ways["padded"] = run([PROMPT * 2, [2] * count + PROMPT], [[1] * 2 * count, [0] * count + [1] * count], {})[0]
    for way, logits in ways.items():
        off = max(abs(float(logits[token]) - expected) for token, expected in TOP.items())
        if not off <= TOLERANCE[form] or int(logits.argmax()) != next(iter(TOP)):
            raise SystemExit(f"{path}, {way}: logits are {off:.4f} off torch's, expected at most {TOLERANCE[form]}")
        print(f"{path.rsplit('/', 1)[-1]}, {way}: logits are {off:.1e} off torch's")
