"""A tiny fresh BERT classifier as torch exports it by default, adapters for it, and what PyTorch and PEFT answer.

All biases of a fresh model are zero, and torch's optimiser removes those of Gemm: `classifier.onnx` has neither that of the
classifier nor that of the pooler. `quantised.onnx` is the same in MatMulNBits and without Add: see `as_matmul`.
`int8.onnx` is the same after dynamic quantisation by columns, its nodes named as docs/export.md names them; no answers.

usage: python make.py    (torch 2.13, transformers 5.24, peft 0.21, onnx 1.23, onnxscript 0.7, onnxruntime 1.32)
"""
import ast, json, pathlib, sys, tempfile
HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "make"))
from graphs import SCOPES, cleaned, dequantised, dynamo, in_four_bits, initializers, labels_of, randomise, save_adapter, set_nodes, with_state
import numpy as np, onnx, torch
from onnx import helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import BertConfig, BertForSequenceClassification

SCRATCH = pathlib.Path(tempfile.mkdtemp()) / "export.onnx"
NAMES = ["input_ids", "attention_mask", "token_type_ids"]
IDS = torch.tensor([[2, 17, 5, 30, 9, 3], [2, 1, 28, 3, 0, 0]])
MASK = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
FEEDS = dict(zip(NAMES, (IDS, MASK, torch.zeros_like(IDS))))


def bert(labels=4):
    torch.manual_seed(7)
    return BertForSequenceClassification(BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16, num_labels=labels, initializer_range=0.3)).eval()


base = bert().state_dict()
save_file({name: value.contiguous() for name, value in base.items()}, HERE / "base.safetensors")


# ---- exports

batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence")
model = cleaned(dynamo(bert(), tuple(value[:, :5] for value in FEEDS.values()), input_names=NAMES, output_names=["logits"],
                       dynamic_shapes={name: {0: batch, 1: sequence} for name in NAMES}), keep=(SCOPES,), values=False)
onnx.save(model, HERE / "classifier.onnx")
gemms = [node for node in model.graph.node if node.op_type == "Gemm"]
assert len(gemms) == 2 and all(len(node.input) == 2 for node in gemms), "the exporter has kept the biases"


def as_matmul(model):
    """Gemm as MatMul, which is all that MatMulNBits takes the place of; and no Add of zeros, which other optimisers remove."""
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    nodes, renamed = [], {}
    for node in model.graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        if node.op_type == "Gemm":
            x, weight = node.input
            name = f"val_{node.name}"
            turned = helper.make_node("MatMul", [x, name], list(node.output), node.name)
            model.graph.initializer.append(numpy_helper.from_array(tensors[weight].T.copy(), name))
            turned.metadata_props.extend(node.metadata_props)
            nodes.append(turned)
        elif node.op_type == "Add" and not tensors.get(node.input[1], np.ones(1)).any():
            renamed[node.output[0]] = node.input[0]
        else:
            nodes.append(node)
    return set_nodes(model, nodes)


quantised = in_four_bits(as_matmul(onnx.load(HERE / "classifier.onnx")), bits=4, block_size=16, is_symmetric=True)
# The quantiser forgets where in PyTorch's model a node comes from.
places = {node.output[0]: node for node in as_matmul(onnx.load(HERE / "classifier.onnx")).graph.node}
for node in quantised.graph.node:
    if node.op_type == "MatMulNBits":
        node.metadata_props.extend(places[node.output[0]].metadata_props)
used = {name for node in quantised.graph.node for name in node.input}
unused = [tensor for tensor in quantised.graph.initializer if tensor.name not in used]
for tensor in unused:
    quantised.graph.initializer.remove(tensor)
del quantised.graph.value_info[:]
onnx.save(quantised, HERE / "quantised.onnx")
assert sum(node.op_type == "MatMulNBits" for node in quantised.graph.node) == 8


named = onnx.load(HERE / "classifier.onnx")
for i, node in enumerate(named.graph.node):
    for entry in node.metadata_props:
        if entry.key == SCOPES and node.op_type in ("MatMul", "Gemm"):
            node.name = "/" + ast.literal_eval(entry.value)[-2].replace(".", "/") + f"/{node.op_type}_{i}"
onnx.save(named, SCRATCH)
# 7-bit weights: with 8 bits the sums of some instruction sets saturate.
quantize_dynamic(SCRATCH, HERE / "int8.onnx", weight_type=QuantType.QInt8, per_channel=True, reduce_range=True)
integers = onnx.load(HERE / "int8.onnx")
del integers.graph.value_info[:]
onnx.save(integers, HERE / "int8.onnx")


def with_weights_of(model):
    """`base` with the weights that MatMulNBits means."""
    state = dict(base)
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            scopes = next(p.value for p in node.metadata_props if p.key == SCOPES)
            name = ast.literal_eval(scopes)[-2] + ".weight"
            state[name] = dequantised(node, initializers(model)).float()
            assert (state[name] - base[name]).abs().max() < 0.2, name
    return state


# ---- adapters

def adapter(name, labels, seed, **config):
    config = {"r": 2, "lora_alpha": 4, "target_modules": ["query", "value"]} | config
    peft = get_peft_model(with_state(bert(labels), base), LoraConfig(**config))
    save_adapter(randomise(peft, seed, 0.3), HERE / "adapters" / name, labels)


whole = {"task_type": "SEQ_CLS"}
adapter("head", 3, 1, **whole)
adapter("biases", 2, 2, bias="all", **whole)
adapter("lora-bias", 5, 3, target_modules=["query", "pooler.dense"], lora_bias=True, **whole)
adapter("dora", 4, 4, target_modules=["query", "pooler.dense"], use_dora=True, bias="lora_only", **whole)
# Heads of four labels, as adapters of the classifier keep them.
adapter("same-head", 4, 5, **whole)
adapter("adapted-head", 4, 6, target_modules=["query", "classifier"], bias="lora_only")


@torch.no_grad()
def answer(name, state):
    if name is None:
        model = with_state(bert(4), state)
    else:
        path = HERE / "adapters" / name
        model = PeftModel.from_pretrained(with_state(bert(labels_of(path)), state), path)
    return model.double().eval()(**FEEDS).logits.float().numpy().tolist()


names = sorted(path.name for path in (HERE / "adapters").iterdir())
outputs = {file: {"base": answer(None, state)} | {name: answer(name, state) for name in names}
           for file, state in (("classifier", base), ("quantised", with_weights_of(quantised)))}
feeds = {name: value.tolist() for name, value in FEEDS.items()}
(HERE / "goldens.json").write_text(json.dumps({"feeds": feeds, "outputs": outputs}) + "\n")
