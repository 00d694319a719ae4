"""A tiny fresh BERT classifier as torch exports it by default, adapters for it, and what PyTorch and PEFT answer.

All biases of a fresh model are zero, and torch's optimiser removes those of Gemm: `classifier.onnx` has neither that of the
classifier nor that of the pooler. `quantised.onnx` is the same in MatMulNBits and without Add: see `as_matmul`.
`int8.onnx` is the same after dynamic quantisation by columns, its nodes named as docs/export.md names them; no answers.

usage: python make.py    (torch 2.13, transformers 5.24, peft 0.21, onnx 1.23, onnxscript 0.7, onnxruntime 1.32)
"""
import ast, json, logging, os, pathlib, shutil, tempfile, warnings
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when onnxruntime is imported
import numpy as np, onnx, torch
from onnx import helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import BertConfig, BertForSequenceClassification

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)
HERE = pathlib.Path(__file__).parent
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


def with_state(labels, state):
    """A head of another size stays as it is: the task brings its own."""
    model = bert(labels)
    own = model.state_dict()
    model.load_state_dict({name: value if value.shape == own[name].shape else own[name] for name, value in state.items()})
    return model


# ---- exports

batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence")
torch.onnx.export(bert(), tuple(value[:, :5] for value in FEEDS.values()), SCRATCH, dynamo=True, external_data=False,
                  verbose=False, input_names=NAMES, output_names=["logits"],
                  dynamic_shapes={name: {0: batch, 1: sequence} for name in NAMES})
model = onnx.load(SCRATCH)
for node in model.graph.node:
    node.doc_string = ""
    keep = [p for p in node.metadata_props if p.key == "pkg.torch.onnx.name_scopes"]
    del node.metadata_props[:]
    node.metadata_props.extend(keep)
del model.graph.value_info[:]
for thing in [model, model.graph, *model.graph.input, *model.graph.output,
              *model.graph.initializer]:
    del thing.metadata_props[:]
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
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


quantizer = MatMulNBitsQuantizer(as_matmul(onnx.load(HERE / "classifier.onnx")), bits=4, block_size=16, is_symmetric=True)
quantizer.process()
quantised = quantizer.model.model
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
        if entry.key == "pkg.torch.onnx.name_scopes" and node.op_type in ("MatMul", "Gemm"):
            node.name = "/" + ast.literal_eval(entry.value)[-2].replace(".", "/") + f"/{node.op_type}_{i}"
onnx.save(named, SCRATCH)
# 7-bit weights: with 8 bits the sums of some instruction sets saturate.
quantize_dynamic(SCRATCH, HERE / "int8.onnx", weight_type=QuantType.QInt8, per_channel=True, reduce_range=True)
integers = onnx.load(HERE / "int8.onnx")
del integers.graph.value_info[:]
onnx.save(integers, HERE / "int8.onnx")


def dequantised():
    """`base` with the weights that MatMulNBits means: 4 bits, offset 8, low nibble first, a scale per 16 of a row."""
    state, tensors = dict(base), {tensor.name: numpy_helper.to_array(tensor) for tensor in quantised.graph.initializer}
    for node in quantised.graph.node:
        if node.op_type == "MatMulNBits":
            attributes = {a.name: a.i for a in node.attribute}
            packed, scales = (tensors[name] for name in node.input[1:])
            values = np.stack([packed & 15, packed >> 4], -1).reshape(attributes["N"], -1, 16).astype(np.float64) - 8
            weight = (values * scales.reshape(attributes["N"], -1, 1)).reshape(attributes["N"], -1)
            scopes = next(p.value for p in node.metadata_props if p.key == "pkg.torch.onnx.name_scopes")
            name = json.loads(scopes.replace("'", '"'))[-2] + ".weight"
            assert np.abs(weight - base[name].numpy()).max() < 0.2, name
            state[name] = torch.tensor(weight, dtype=torch.float32)
    return state


# ---- adapters

def adapter(name, labels, seed, **config):
    """All that is trained is random, and large enough to matter."""
    path = HERE / "adapters" / name
    shutil.rmtree(path, ignore_errors=True)
    config = {"r": 2, "lora_alpha": 4, "target_modules": ["query", "value"]} | config
    peft = get_peft_model(with_state(labels, base), LoraConfig(**config))
    random = torch.Generator().manual_seed(seed)
    for key, parameter in peft.named_parameters():
        if parameter.requires_grad and "original_module" not in key:
            noise = torch.randn(parameter.shape, generator=random)
            parameter.data = (1 + 0.5 * noise) * parameter if "magnitude" in key else parameter + 0.3 * noise
    peft.save_pretrained(path)
    (path / "README.md").unlink()
    file = path / "adapter_config.json"
    saved = json.loads(file.read_text()) | {"base_model_name_or_path": "tiny-random"}
    for key in ("target_modules", "modules_to_save"):
        saved[key] = saved[key] and sorted(saved[key])
    file.write_text(json.dumps(saved, indent=1, sort_keys=True) + "\n")
    (path / "task.json").write_text(json.dumps({"labels": [f"{name} {i}" for i in range(labels)]}) + "\n")


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
        model = with_state(4, state)
    else:
        labels = len(json.loads((HERE / "adapters" / name / "task.json").read_text())["labels"])
        model = PeftModel.from_pretrained(with_state(labels, state), HERE / "adapters" / name)
    return model.double().eval()(**FEEDS).logits.float().numpy().tolist()


names = sorted(path.name for path in (HERE / "adapters").iterdir())
outputs = {file: {"base": answer(None, state)} | {name: answer(name, state) for name in names}
           for file, state in (("classifier", base), ("quantised", dequantised()))}
feeds = {name: value.tolist() for name, value in FEEDS.items()}
(HERE / "goldens.json").write_text(json.dumps({"feeds": feeds, "outputs": outputs}) + "\n")
