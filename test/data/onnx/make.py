"""Tiny models as PyTorch's exporters write them, and models built by hand for what exporters rarely do.

Beside each export NAME.onnx lies NAME.json: the parameters of the PyTorch model, as its state_dict has them: name ->
[shape, SHA-256 of the little-endian values]. A tied or merged parameter has all its names.

usage: python make.py    (torch 2.13, transformers 5.24, onnx 1.23, onnxscript 0.7)
"""
import hashlib, json, pathlib, sys
HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "make"))
from graphs import cleaned
import numpy as np, onnx, torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from transformers import BertConfig, BertForSequenceClassification
from transformers.pytorch_utils import Conv1D


def save(name, model, parameters, **how):
    onnx.checker.check_model(cleaned(model))
    onnx.save(model, HERE / f"{name}.onnx", **how)
    (HERE / f"{name}.json").write_text(json.dumps(parameters, indent=1) + "\n")


def digest(array):
    return [list(array.shape), hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()]


def digests(module):
    return {key: digest(value.numpy()) for key, value in module.state_dict().items() if value.is_floating_point()}


def export(name, module, args, **how):
    path = HERE / f"{name}.onnx"
    how |= {"external_data": False} if how["dynamo"] else {"opset_version": 17}
    torch.onnx.export(module.eval(), args, path, **how)
    save(name, onnx.load(path), digests(module))


def bert(random):
    torch.manual_seed(0)
    config = BertConfig(vocab_size=60, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40,
                        max_position_embeddings=16, num_labels=3)
    model = BertForSequenceClassification(config)
    if random:
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.1)
    return model


ids = torch.randint(0, 60, (2, 7))
feeds = (ids, torch.ones_like(ids), torch.zeros_like(ids))
# Biases are all zero and LayerNorm weights all one, as at the start of a training: the exporter merges them.
export("bert-torchscript", bert(False), feeds, dynamo=False)
batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence")
names = ["input_ids", "attention_mask", "token_type_ids"]
# Free lengths: with fixed ones, the position embeddings would be folded into a constant.
export("bert-dynamo", bert(True), feeds, dynamo=True, input_names=names,
       dynamic_shapes={name: {0: batch, 1: sequence} for name in names})


class Gemms(nn.Module):
    """Linear becomes Gemm with transB, GPT-2's Conv1D Gemm without."""
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), Conv1D(4, 10)

    def forward(self, x):
        return self.down(self.up(x).relu())


class Convs(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 2, groups=2))
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))


class Tied(nn.Module):
    """One weight for embedding and head, one layer that runs twice, one nameless matrix."""
    def __init__(self):
        super().__init__()
        self.embed, self.layer, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9, bias=False)
        self.head.weight = self.embed.weight
        self.mix = nn.Parameter(torch.randn(6, 6))

    def forward(self, ids):
        return self.head(self.layer(self.layer(self.embed(ids)).relu()) @ self.mix)



class Applied(nn.Module):
    """One layer on inputs of three and of two dimensions: a MatMul with a turned copy of the weight, and a Gemm."""
    def __init__(self):
        super().__init__()
        self.up, self.mid = nn.Linear(6, 8), nn.Linear(8, 8)

    def forward(self, x):
        h = self.up(x).relu()
        return self.mid(h).mean(1) + self.mid(h[:, 0])


torch.manual_seed(1)
for module in (gemms := Gemms()).modules():
    if isinstance(module, Conv1D):
        nn.init.normal_(module.bias)
tied = Tied()
export("gemms", gemms, (torch.randn(2, 6),), dynamo=False)
export("convs", Convs(), (torch.randn(2, 3, 8, 8),), dynamo=False)
tokens = (torch.randint(0, 9, (2, 3)),)
export("tied-torchscript", tied, tokens, dynamo=False)
export("tied-torchscript-unfolded", tied, tokens, dynamo=False, do_constant_folding=False)
export("tied-dynamo", tied, tokens, dynamo=True)
export("tied-dynamo-unfolded", tied, tokens, dynamo=True, optimize=False)

torch.manual_seed(2)
applied, rows = Applied(), (torch.randn(2, 3, 6),)
named = {"input_names": ["x"], "output_names": ["logits"]}
export("applied-torchscript", applied, rows, dynamo=False, dynamic_axes={"x": {0: "batch", 1: "sequence"}}, **named)
export("applied-dynamo", applied, rows, dynamo=True, dynamic_shapes={"x": {0: batch, 1: sequence}}, **named)

(HERE / "external.onnx.data").unlink(missing_ok=True)
save("external", onnx.load(HERE / "gemms.onnx"), digests(gemms), save_as_external_data=True,
     location="external.onnx.data", size_threshold=0)

# Made by hand: values in typed lists, weights behind other nodes, a use in a branch.
rng = np.random.default_rng(0)
w = rng.standard_normal((4, 4)).astype(np.float32)
halves = w.astype(np.float16)
bf16 = (w.view(np.uint32) >> 16).astype(np.uint16)
quantised = rng.integers(-127, 128, (4, 4)).astype(np.int8)
tensors = [
    helper.make_tensor("list.f32.weight", TensorProto.FLOAT, [4, 4], w.flatten().tolist()),
    helper.make_tensor("list.f16.weight", TensorProto.FLOAT16, [4, 4], halves.flatten().tolist()),
    TensorProto(name="list.bf16.weight", data_type=TensorProto.BFLOAT16, dims=[4, 4], int32_data=bf16.ravel().tolist()),
    numpy_helper.from_array(halves, "cast.weight_f16"),
    numpy_helper.from_array(w + 1, "turned.weight"),
    numpy_helper.from_array(quantised, "dequantised.weight_quantized"),
    numpy_helper.from_array(np.float32(0.02), "scale"),
    numpy_helper.from_array(np.int8(0), "zero"),
    numpy_helper.from_array(w + 2, "branch"),
    numpy_helper.from_array(w + 3, "onnx::MatMul_1"),
    numpy_helper.from_array(w + 4, "onnx::MatMul_2"),
    numpy_helper.from_array(np.array(True), "condition"),
]
node = helper.make_node
matrix = lambda name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 4])
branch = lambda name: helper.make_graph([node("MatMul", ["h8", "branch"], [f"{name}_out"], "/branch/MatMul")], name, [],
                                        [matrix(f"{name}_out")])
nodes = [
    node("MatMul", ["x", "list.f32.weight"], ["h1"], "/list/f32/MatMul"),
    node("Cast", ["list.f16.weight"], ["list_f16"], to=TensorProto.FLOAT),
    node("MatMul", ["h1", "list_f16"], ["h2"]),
    node("Cast", ["list.bf16.weight"], ["list_bf16"], to=TensorProto.FLOAT),
    node("MatMul", ["h2", "list_bf16"], ["h3"]),
    node("Cast", ["cast.weight_f16"], ["cast.weight"], to=TensorProto.FLOAT),
    node("MatMul", ["h3", "cast.weight"], ["h4"], "/cast/MatMul"),
    node("Transpose", ["turned.weight"], ["turned"], perm=[1, 0]),
    node("MatMul", ["h4", "turned"], ["h5"], "/turned/MatMul"),
    node("DequantizeLinear", ["dequantised.weight_quantized", "scale", "zero"], ["dequantised.weight_dequantized"]),
    node("MatMul", ["h5", "dequantised.weight_dequantized"], ["h6"], "/dequantised/MatMul"),
    # Two matrices in one module: their names cannot be told.
    node("MatMul", ["h6", "onnx::MatMul_1"], ["h7"], "/two/MatMul"),
    node("MatMul", ["h7", "onnx::MatMul_2"], ["h8"], "/two/MatMul_1"),
    node("If", ["condition"], ["y"], then_branch=branch("then"), else_branch=branch("else")),
]
graph = helper.make_graph(nodes, "by-hand", [matrix("x")], [matrix("y")], tensors)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
save("by-hand", model, {
    "list.f32.weight": digest(w),
    "list.f16.weight": digest(halves),
    "list.bf16.weight": digest(bf16),
    "cast.weight": digest(halves),
    "turned.weight": digest(w + 1),
    "branch.weight": digest(w + 2),
    "onnx::MatMul_1": digest(w + 3),
    "onnx::MatMul_2": digest(w + 4),
})
