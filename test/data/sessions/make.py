"""Tiny models as people export, quantise and optimise them, PEFT adapters for them, and what PyTorch and PEFT answer.

README.md lists the files. Every model is one of four random PyTorch models: a BERT classifier, the same with equal
query weights in both layers, the BERT without its classifier, an MLP. The answers are computed in f64 by PyTorch with
PEFT's own layers, from the adapters as saved, and rounded. Where activations are quantised they depend on the kernels:
there the answers are ONNX Runtime's, of a copy of the model into which PEFT's factors were wired, see `wired`.

usage: python make.py    (torch 2.13, transformers 5.24, peft 0.21, onnx 1.23, onnxscript 0.7, onnxruntime 1.32,
                          onnxconverter-common 1.16)
"""
import json, math, pathlib, re, shutil, sys, tempfile
HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "make"))
from graphs import (Calibration, answer_of, cleaned, constant, dequantised, dynamo, in_four_bits, initializers, labels_of, lines, producers, randomise, report,
                    save_adapter, set_nodes, set_ordered, torchscript, with_state, without_traces)
import numpy as np, onnx, torch
from onnx import TensorProto, helper, numpy_helper
from onnxconverter_common.float16 import convert_float_to_float16
from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static
from onnxruntime.transformers.fusion_options import FusionOptions
from onnxruntime.transformers.optimizer import optimize_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertModel, BertForSequenceClassification

SCRATCH = pathlib.Path(tempfile.mkdtemp())

NAMES = ["input_ids", "attention_mask", "token_type_ids"]
TOKENS = [1, 5, 9]
IDS = torch.tensor([[2, 17, 5, 40, 9, 33, 3], [2, 1, 58, 3, 0, 0, 0], [2, 9, 21, 63, 1, 3, 0]])
MASK = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] * 6 + [0]])
TYPES = torch.tensor([[0, 0, 0, 0, 1, 1, 1], [0] * 7, [0, 0, 0, 1, 1, 1, 0]])
FEEDS = dict(zip(NAMES, (IDS, MASK, TYPES)))
X = torch.randn(3, 12, generator=torch.Generator().manual_seed(12))
DEEP = torch.tensor([False])


# ---- models

def bert(labels=4, attention="sdpa"):
    return BertForSequenceClassification(BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=16, num_labels=labels, attn_implementation=attention)).eval()


class Encoder(BertModel):
    """The exporter would hand BertModel's optional arguments over, and be refused."""
    def forward(self, input_ids, attention_mask, token_type_ids):
        return super().forward(input_ids, attention_mask, token_type_ids).last_hidden_state


class MLP(nn.Module):
    def __init__(self, labels=4):
        super().__init__()
        self.up, self.mid, self.classifier = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, labels)

    def forward(self, x):
        return self.classifier(self.mid(nn.functional.gelu(self.up(x))).tanh())


class Twice(MLP):
    """`mid` runs twice."""
    def forward(self, x):
        once = self.mid(nn.functional.gelu(self.up(x))).tanh()
        return self.classifier(self.mid(once).tanh())


def random_state(model, seed):
    """Biases and embeddings too: what is zero or equal in a fresh model would be merged by the exporter."""
    random = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.data = torch.randn(parameter.shape, generator=random) * 0.1 + name.endswith("LayerNorm.weight")
    return model.state_dict()


QUERY = "bert.encoder.layer.{}.attention.self.query.weight"
base = random_state(bert(), 0)
tied = {name: value.clone() for name, value in random_state(bert(), 1).items()}
tied[QUERY.format(1)] = tied[QUERY.format(0)].clone()
# Larger, so that GELU and tanh matter.
mlp = {name: value * 3 for name, value in random_state(MLP(), 2).items()}
for name, state in (("base", base), ("base-tied", tied), ("base-mlp", mlp)):
    save_file({key: value.contiguous() for key, value in state.items()}, HERE / f"{name}.safetensors")


# ---- exports

def save(name, model, **how):
    if how:
        (HERE / how["location"]).unlink(missing_ok=True)
    onnx.save(cleaned(model), HERE / f"{name}.onnx", **how)


def export(name, module, feeds, inputs=NAMES, output="logits", opset=17):
    axes = {key: {0: "batch", 1: "sequence"} if key in NAMES or key == "last_hidden_state" else {0: "batch"} for key in [*inputs, output]}
    save(name, torchscript(module, feeds, {key: axes[key] for key in inputs}, {output: axes[output]}, opset))


def load(name):
    return onnx.load(HERE / f"{name}.onnx")


def halves(model):
    """f16 initializers, each behind a Cast to f32."""
    casts = []
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            name = tensor.name
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), f"{name}_f16"))
            casts.append(helper.make_node("Cast", [f"{name}_f16"], [name], f"{name}_cast", to=TensorProto.FLOAT))
    return set_nodes(model, [*casts, *model.graph.node])


def without_transB(model):
    """Gemm as y = x·W + b, W stored [in, out] under its old name."""
    weights = initializers(model)
    for node in model.graph.node:
        if node.op_type == "Gemm":
            weight = weights[node.input[1]]
            weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight).T.copy(), weight.name))
            next(a for a in node.attribute if a.name == "transB").i = 0
    return model


def behind_transpose(model):
    """Gemm as MatMul and Add, W stored [out, in] and turned by a node."""
    nodes = []
    for node in model.graph.node:
        if node.op_type != "Gemm":
            nodes.append(node)
            continue
        path, (x, weight, bias) = node.name.removesuffix("/Gemm"), node.input
        turned, product = f"{path}/Transpose_output_0", f"{path}/MatMul_output_0"
        nodes += [helper.make_node("Transpose", [weight], [turned], f"{path}/Transpose", perm=[1, 0]),
                  helper.make_node("MatMul", [x, turned], [product], f"{path}/MatMul"),
                  helper.make_node("Add", [bias, product], list(node.output), f"{path}/Add")]
    return set_nodes(model, nodes)


def with_branches(model):
    """
    The MLP with `mid` and tanh in the branches of an If: as Gemm in the one; in the other twice as MatMul, each time of
    a weight that is turned in the branch itself.
    """
    nodes = {node.name: node for node in model.graph.node}
    (x, weight, bias), end = nodes["/mid/Gemm"].input, nodes["/Tanh"].output[0]

    def graph(name, nodes, output):
        return helper.make_graph(nodes, name, [], [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)])

    def layer(path, x, y):
        turned, product, sum = (f"{path}/{part}_output_0" for part in ("Transpose", "MatMul", "Add"))
        return [helper.make_node("Transpose", [weight], [turned], f"{path}/Transpose", perm=[1, 0]),
                helper.make_node("MatMul", [x, turned], [product], f"{path}/MatMul"),
                helper.make_node("Add", [product, bias], [sum], f"{path}/Add"),
                helper.make_node("Tanh", [sum], [y], f"{y}/Tanh")]

    once = [helper.make_node("Gemm", [x, weight, bias], ["mid"], "/mid/Gemm", transB=1),
            helper.make_node("Tanh", ["mid"], ["once"], "/Tanh")]
    branch = helper.make_node("If", ["deep"], [end], "/If",
                              then_branch=graph("deep", [*layer("/mid", x, "first"), *layer("/mid_1", "first", "twice")], "twice"),
                              else_branch=graph("flat", once, "once"))
    rest = [branch if node.name == "/mid/Gemm" else node for node in model.graph.node if node.name != "/Tanh"]
    model.graph.input.append(helper.make_tensor_value_info("deep", TensorProto.BOOL, [1]))
    return set_nodes(model, rest)


def calibration():
    random = np.random.default_rng(3)
    mask = (np.arange(7) < random.integers(3, 8, 8)[:, None]).astype(np.int64)
    feeds = dict(zip(NAMES, (random.integers(1, 64, (8, 7)) * mask, mask, random.integers(0, 2, (8, 7)))))
    return Calibration(feeds, {key: value.numpy() for key, value in FEEDS.items()})


model = with_state(bert(), base)
# Not the golden feeds' shape: what the exporter wrongly takes for a constant shows in the check below.
trace = (IDS[1:, :5], MASK[1:, :5], TYPES[1:, :5])
export("torchscript", model, trace)
batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence")
free = dict(input_names=NAMES, output_names=["logits"], dynamic_shapes={key: {0: batch, 1: sequence} for key in NAMES})
save("dynamo", dynamo(model, trace, optimize=False, **free))
onnx.save(without_traces(dynamo(model, trace, **free)), HERE / "dynamo-optimized.onnx")
save("external", load("torchscript"), save_as_external_data=True, location="external.onnx.data")
save("f16", halves(load("torchscript")))
save("half", convert_float_to_float16(load("torchscript"), keep_io_types=True))
# 7-bit weights: with 8 bits the sums of some instruction sets saturate, and the results differ between machines.
quantize_dynamic(HERE / "torchscript.onnx", HERE / "int8.onnx", weight_type=QuantType.QInt8, reduce_range=True)
quantize_static(HERE / "torchscript.onnx", HERE / "qdq.onnx", calibration(), quant_format=QuantFormat.QDQ,
                op_types_to_quantize=["MatMul", "Gemm"], per_channel=True, reduce_range=True)
for name in ("int8", "qdq"):
    save(name, load(name))
save("q4", in_four_bits(load("torchscript"), bits=4, block_size=16, is_symmetric=True))
export("tied", with_state(bert(), tied), trace)
encoder = Encoder(model.config, add_pooling_layer=False).eval()
encoder.load_state_dict({key.removeprefix("bert."): value for key, value in base.items() if "encoder" in key
                         or "embeddings" in key})
export("encoder", encoder, trace, output="last_hidden_state")
export("gemm", with_state(MLP().eval(), mlp), (X[:2],), ["x"])
save("gemm-nn", without_transB(load("gemm")))
save("transposed", behind_transpose(load("gemm")))
# 11 is the oldest opset whose operators suffice.
export("twice", with_state(Twice().eval(), mlp), (X[:2],), ["x"], opset=11)
export("branches", with_state(MLP().eval(), mlp), (X[:2],), ["x"], opset=11)
save("branches", with_branches(load("branches")))
# Query, key and value in one Attention node. ONNX Runtime's patterns know the eager form only.
export("fused", with_state(bert(attention="eager"), base), trace)
fusions = FusionOptions("bert")
fusions.enable_embed_layer_norm = False
save("fused", optimize_model(str(HERE / "fused.onnx"), "bert", num_heads=2, hidden_size=32,
                             optimization_options=fusions).model)

for name, operator, count in (("int8", "MatMulInteger", 14), ("q4", "MatMulNBits", 12), ("fused", "Attention", 2)):
    assert sum(node.op_type == operator for node in load(name).graph.node) == count
queries = [node.input[1] for node in load("tied").graph.node if node.name.endswith("query/MatMul")]
merged = {node.output[0]: node.input[0] for node in load("tied").graph.node if node.op_type == "Identity"}
assert len({merged.get(name, name) for name in queries}) == 1, "the exporter kept equal weights apart"


# ---- adapters

def adapter(folder, labels, make=bert, state=base, seed=0, **config):
    """A PEFT adapter whose trainable parameters are random, and large enough to matter."""
    torch.manual_seed(seed)
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["query", "value"]} | config
    model = get_peft_model(with_state(make(labels), state), LoraConfig(**config))
    save_adapter(randomise(model, seed, 0.4, A=0.3, B=0.1), HERE / folder, labels)


classifier = {"task_type": "SEQ_CLS"}
adapter("adapters/two", 2, seed=10, **classifier)
adapter("adapters/three", 3, seed=11, **classifier)
adapter("adapters/five", 5, seed=12, r=3, use_rslora=True, **classifier)
more = {
    "dora": (3, {"use_dora": True}),
    "bias": (2, {"bias": "all"}),
    "bias-lora": (2, {"bias": "lora_only"}),
    "dense": (3, {"target_modules": ["query", "key", "value", "dense"]}),
    "tokens": (2, {"trainable_token_indices": TOKENS}),
    "embedding": (2, {"target_modules": ["query", "value", "word_embeddings"]}),
    # PEFT adds the classifier.
    "norm": (2, {"modules_to_save": ["encoder.layer.1.output.LayerNorm"]}),
}
for seed, (name, (labels, config)) in enumerate(more.items(), 20):
    adapter(f"adapters-more/{name}", labels, seed=seed, **classifier, **config)
small = {"make": MLP, "state": mlp, "target_modules": ["up", "mid"], "modules_to_save": ["classifier"]}
adapter("adapters-mlp/a", 2, seed=30, **small)
adapter("adapters-mlp/b", 3, seed=31, r=2, **small)


# ---- what PyTorch and PEFT answer

@torch.no_grad()
def answer(folder=None, make=bert, state=base, feeds=FEEDS, hidden=False):
    """The logits, or the BERT's last hidden state, of the base or of an adapter, read from its folder."""
    if folder is None:
        inner = model = with_state(make(), state)
    else:
        model = PeftModel.from_pretrained(with_state(make(labels_of(HERE / folder)), state), HERE / folder)
        inner = model.base_model.model
    model.double().eval()
    if make in (MLP, Twice):
        output = model(X.double())
    else:
        output = inner.bert(**feeds).last_hidden_state if hidden else model(**feeds).logits
    return output.float().numpy()


def tasks(folder):
    return {path.name: f"{folder}/{path.name}" for path in sorted((HERE / folder).iterdir())}


def answers(folders, **how):
    return {"base": answer(**how)} | {name: answer(folder, **how) for name, folder in folders.items()}


def checked_for_effect(folder, drop, **how):
    """The answers differ clearly from those with the base's values in the tensors whose names match `drop`."""
    path = SCRATCH / "reduced"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(HERE / folder, path)
    tensors = load_file(path / "adapter_model.safetensors")
    for key in [key for key in tensors if re.search(drop, key)]:
        name = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
        if re.search("lora_(embedding_)?[AB]", key):
            tensors[key] = torch.zeros_like(tensors[key])
        elif "token_adapter" in key:
            tensors[key] = base["bert.embeddings.word_embeddings.weight"][TOKENS].contiguous()
        elif name in base:
            tensors[key] = base[name].clone()
        else:  # a magnitude, for which PEFT takes the base's
            del tensors[key]
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    effect = np.abs(answer(folder, **how) - answer(path, **how)).max()
    print(f"effect of {drop} in {folder}: {effect:.3f}")
    assert effect > 0.05


for folder in (*tasks("adapters").values(), *tasks("adapters-more").values()):
    checked_for_effect(folder, "lora_(A|B)")
for name, drop in (("dora", "magnitude"), ("bias", r"(?<!classifier)\.bias"), ("bias-lora", r"(?<!classifier)\.bias"),
                   ("dense", r"dense\.lora"), ("tokens", "token_adapter"),
                   ("embedding", "lora_embedding"), ("norm", "LayerNorm")):
    checked_for_effect(f"adapters-more/{name}", drop)
for folder in tasks("adapters-mlp").values():
    checked_for_effect(folder, "lora_", make=MLP, state=mlp)


def with_weights_of(model):
    """`base` with the weights that MatMulNBits means."""
    state = dict(base)
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            weight = dequantised(node, initializers(model)).float()
            name = node.name.removeprefix("/").removesuffix("/MatMul_Q4").replace("/", ".") + ".weight"
            assert (weight - base[name]).abs().max() < 0.05
            state[name] = weight
    return state


def wired(model, folder, integer):
    """
    A copy of a quantised model in which every query and value computes dequantised(x·W) + (x·Aᵀ)·Bᵀ·scale, x being the
    float value that enters (what DynamicQuantizeLinear reads; what DequantizeLinear gives), and in which the classifier
    is a float Gemm of the task, its output not quantised.
    """
    model = onnx.ModelProto.FromString(model.SerializeToString())
    graph = model.graph
    config = json.loads((HERE / folder / "adapter_config.json").read_text())
    tensors = load_file(HERE / folder / "adapter_model.safetensors")
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    nodes, made = {node.name: node for node in graph.node}, producers(model)

    def entering(name):
        value = nodes[name].input[0]
        return made[value].input[0] if integer else value

    added = []
    for key in tensors:
        if not key.endswith("lora_A.weight"):
            continue
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        node = "/" + re.sub(r"\.(?!\d)", "/", module) + "/MatMul"
        A = constant(model, f"{module}.A", tensors[key].T)
        B = constant(model, f"{module}.B", tensors[key.replace("lora_A", "lora_B")].T * scale)
        y = f"{node}_output_0" + ("" if integer else "_DequantizeLinear_Output")
        for consumer in graph.node:
            consumer.input[:] = [f"{module}.sum" if value == y else value for value in consumer.input]
        x = entering(node + ("_quant" if integer else ""))
        added += [helper.make_node("MatMul", [x, A], [f"{module}.down"]),
                  helper.make_node("MatMul", [f"{module}.down", B], [f"{module}.term"]),
                  helper.make_node("Add", [y, f"{module}.term"], [f"{module}.sum"])]
    assert len(added) == 12
    head = [constant(model, f"task.{part}", tensors[f"base_model.model.classifier.{part}"]) for part in ("weight", "bias")]
    x = entering("/classifier/Gemm" + ("_MatMul_quant" if integer else ""))
    made["logits"].output[0] = "old logits"
    added.append(helper.make_node("Gemm", [x, *head], ["logits"], transB=1))
    graph.output[0].type.tensor_type.shape.dim[1].dim_param = "labels"
    set_ordered(model, [*graph.node, *added])
    onnx.checker.check_model(model)
    return model


def run(model, feeds=FEEDS, optimise=True):
    return answer_of(HERE / f"{model}.onnx" if isinstance(model, str) else model, feeds, optimise)


def quantised(name):
    """Without ONNX Runtime's fusions, as ONNX defines the operators; with them, integers may round differently."""
    models = {"base": load(name)}
    models |= {task: wired(models["base"], folder, name == "int8") for task, folder in tasks("adapters").items()}
    exact = {task: run(model, optimise=False) for task, model in models.items()}
    for task, model in models.items():
        float_answer = answer(None if task == "base" else f"adapters/{task}")
        print(f"{name} {task}: fusions change {np.abs(run(model) - exact[task]).max():.2g}, "
              f"quantisation {np.abs(float_answer - exact[task]).max():.2g}")
    return exact


f16 = {name: value.half().float() if value.is_floating_point() else value for name, value in base.items()}
outputs = {
    "base": answers(tasks("adapters") | tasks("adapters-more")),
    "tied": answers({name: f"adapters/{name}" for name in ("two", "three")}, state=tied),
    "encoder": answers({"two": "adapters/two", "bias": "adapters-more/bias"}, hidden=True),
    "mlp": answers(tasks("adapters-mlp"), make=MLP, state=mlp),
    "twice": answers(tasks("adapters-mlp"), make=Twice, state=mlp),
    "f16": answers(tasks("adapters"), state=f16),
    "q4": answers(tasks("adapters"), state=with_weights_of(load("q4"))),
    "int8": quantised("int8"),
    "qdq": quantised("qdq"),
}
models = {
    "torchscript": "base", "dynamo": "base", "dynamo-optimized": "base", "external": "base",
    "f16": "f16", "half": "f16", "q4": "q4", "int8": "int8", "qdq": "qdq", "tied": "tied", "encoder": "encoder",
    "gemm": "mlp", "gemm-nn": "mlp", "transposed": "mlp",
    "twice": "twice", "branches": "mlp",
}

# ONNX Runtime agrees with PyTorch on the base, and, where the answers are PyTorch's, at another shape.
for name, key in models.items():
    if not any(node.domain for node in load(name).graph.node):
        onnx.checker.check_model(load(name))
    error = np.abs(run(name, FEEDS | {"x": X, "deep": DEEP}) - outputs[key]["base"]).max()
    print(f"{name}: {error:.2g} off {key}")
    assert error < {"half": 2e-2, "int8": 2e-2, "qdq": 2e-2}.get(name, 1e-4)
    if key == "base":
        other = {key: value[:1, :5] for key, value in FEEDS.items()}
        assert np.abs(run(name, other) - answer(feeds=other)).max() < 1e-4
assert np.abs(run("branches", {"x": X, "deep": ~DEEP}) - outputs["twice"]["base"]).max() < 1e-4

(HERE / "goldens.json").write_text(lines({"feeds": FEEDS | {"x": X, "deep": DEEP}, "models": models, "outputs": outputs}) + "\n")
report(HERE)
shutil.rmtree(SCRATCH)
