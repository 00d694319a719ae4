"""Tiny models with convolutions, embeddings and normalisations, quantised too, PEFT adapters for them, and what PEFT answers.

README.md lists the files. The answers are computed in f64 by PyTorch from PEFT's own merge of the adapters as saved. Where a model
is quantised they are ONNX Runtime's, of a copy of it into which PEFT's delta was wired, see `wired`.

usage: python make.py    (torch 2.13, peft 0.21, onnx 1.23, onnxruntime 1.32)
"""
import json, pathlib, shutil, sys, tempfile
HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "make"))
from graphs import (Calibration, answer_of, cleaned, constant, dynamo, in_four_bits, initializers, labels_of, lines, producers, randomise, report, save_adapter,
                    set_nodes, set_ordered, torchscript, with_state)
import numpy as np, onnx, torch
from onnx import TensorProto, helper
from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig
from onnxruntime.transformers.float16 import convert_float_to_float16
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import nn

SCRATCH = pathlib.Path(tempfile.mkdtemp())


# ---- models

class RMS(nn.Module):
    """As transformers writes it, and exporters take it apart."""
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Vision(nn.Module):
    def __init__(self, labels=3):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.point = nn.Conv2d(8, 12, 1, bias=False)
        self.apart = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.wide = nn.Conv2d(12, 10, 3, padding=2, dilation=2)
        self.odd = nn.Conv2d(10, 8, (3, 2), stride=(2, 1), padding=(0, 1))
        self.norm, self.fc, self.rms = nn.LayerNorm(8), nn.Linear(8, 12), RMS(12)
        self.classifier = nn.Linear(12, labels)

    def forward(self, x):
        x = self.point(self.stem(x).relu())
        x = self.odd(self.wide(self.apart(x).tanh()).sigmoid())
        x = self.norm(x.flatten(2).transpose(1, 2))
        return self.classifier(self.rms(self.fc(x)).tanh().mean(1))


class Signal(nn.Module):
    def __init__(self, labels=3):
        super().__init__()
        self.line = nn.Conv1d(2, 8, 5, stride=2, padding=2)
        self.cube = nn.Conv3d(2, 4, (2, 2, 3), padding=(0, 1, 1))
        self.classifier = nn.Linear(4, labels)

    def forward(self, x):
        x = self.line(x.reshape(-1, 2, 20)).tanh()  # two images a row, as frames of a video are
        return self.classifier(self.cube(x.reshape(-1, 2, 4, 2, 10)).flatten(2).mean(-1))


class Swapped(nn.Module):
    """The batch is not the first dimension of what enters the convolution: tasks of rows would be mixed."""
    def __init__(self, labels=3):
        super().__init__()
        self.line = nn.Conv1d(1, 6, 3, padding=1)
        self.classifier = nn.Linear(12, labels)

    def forward(self, x):
        y = self.line(x.transpose(0, 1).reshape(-1, 1, 8)).tanh().mean(-1)
        return self.classifier(y.reshape(2, -1, 6).transpose(0, 1).flatten(1))


class Text(nn.Module):
    def __init__(self, labels=3):
        super().__init__()
        self.words, self.places = nn.Embedding(40, 16), nn.Embedding(12, 16)
        self.norm, self.query, self.rms = nn.LayerNorm(16), nn.Linear(16, 16), RMS(16)
        self.classifier = nn.Linear(16, labels)

    def forward(self, input_ids, position_ids):
        x = self.norm(self.words(input_ids) + self.places(position_ids))
        return self.classifier(self.rms(x + self.query(x).tanh()).mean(1))


random = torch.Generator().manual_seed(5)
FEEDS = {
    "vision": {"x": torch.randn(3, 3, 10, 12, generator=random)},
    "signal": {"x": torch.randn(3, 4, 20, generator=random)},
    "swapped": {"x": torch.randn(3, 2, 8, generator=random)},
    "text": {"input_ids": torch.randint(0, 40, (3, 7), generator=random),
             "position_ids": torch.stack([torch.arange(7), torch.arange(7) + 2, torch.arange(7) + 5])},
}
MAKE = {"vision": Vision, "signal": Signal, "swapped": Swapped, "text": Text}


def random_state(model, seed):
    random = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        norm = name in ("norm.weight", "rms.weight")
        parameter.data = torch.randn(parameter.shape, generator=random) * 0.3 + norm
        if norm:  # a task may bring another number
            parameter.data[1] = 0
    return model.state_dict()


STATES = {name: {key: value.clone() for key, value in random_state(make(), i).items()}
          for i, (name, make) in enumerate(MAKE.items())}
for name, state in STATES.items():
    save_file(state, HERE / f"{name}.safetensors")


def base(name, labels=3):
    return with_state(MAKE[name](labels), STATES[name]).eval()


# ---- exports

def load(name):
    return onnx.load(HERE / f"{name}.onnx")


def save(name, model):
    onnx.save(cleaned(model), HERE / f"{name}.onnx")


for name, feeds in FEEDS.items():
    axes = {key: {0: "batch"} | ({1: "sequence"} if name == "text" else {}) for key in feeds}
    save(name, torchscript(base(name), tuple(feeds.values()), axes, {"logits": {0: "batch"}}))
save("vision-dynamo", dynamo(base("vision"), tuple(FEEDS["vision"].values()), input_names=["x"], output_names=["logits"],
                             dynamic_shapes={"x": {0: torch.export.Dim("batch")}}, optimize=False))


def fused(model):
    """The text model with its normalisations as ONNX Runtime's optimiser and its model builder write them."""
    made = producers(model)
    norm = next(node for node in model.graph.node if node.op_type == "LayerNormalization")
    add, eps = made[norm.input[0]], next(a.f for a in norm.attribute if a.name == "epsilon")
    norm.op_type, norm.domain = "SkipLayerNormalization", "com.microsoft"
    norm.input[:] = [*add.input, *norm.input[1:]]
    del norm.attribute[:]
    norm.attribute.append(helper.make_attribute("epsilon", eps))
    scaled = next(node for node in model.graph.node if node.op_type == "Mul" and "rms.weight" in node.input)
    start = made[[value for value in scaled.input if value != "rms.weight"][0]]
    sum = made[start.input[0]]
    skip = helper.make_node("SkipSimplifiedLayerNormalization", [*sum.input, "rms.weight"], [scaled.output[0]],
                            "/rms/Skip", domain="com.microsoft", epsilon=1e-6)
    at = list(model.graph.node).index(scaled)
    rest = [skip if i == at else node for i, node in enumerate(model.graph.node)
            if node is not add and (i == at or not node.name.startswith("/rms/")) and node is not sum]
    set_nodes(model, rest)
    if not any(one.domain == "com.microsoft" for one in model.opset_import):
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return model


def simplified(model):
    """The text model with its RMS norm as one node."""
    scaled = next(node for node in model.graph.node if node.op_type == "Mul" and "rms.weight" in node.input)
    start = producers(model)[[value for value in scaled.input if value != "rms.weight"][0]]
    node = helper.make_node("SimplifiedLayerNormalization", [start.input[0], "rms.weight"], [scaled.output[0]],
                            "/rms/Norm", axis=-1, epsilon=1e-6, stash_type=1)
    at = list(model.graph.node).index(scaled)
    rest = [node if i == at else one for i, one in enumerate(model.graph.node)
            if i == at or not one.name.startswith("/rms/")]
    return set_nodes(model, rest)


def padded(model):
    """The vision model whose stem pads by itself: at stride 2 and an even size one more behind than in front."""
    stem = next(node for node in model.graph.node if node.name == "/stem/Conv")
    kept = [a for a in stem.attribute if a.name != "pads"]
    del stem.attribute[:]
    stem.attribute.extend([*kept, helper.make_attribute("auto_pad", "SAME_UPPER")])
    del model.graph.value_info[:]
    return model


def calibration():
    random = np.random.default_rng(3)
    return Calibration({"x": random.standard_normal((8, 3, 10, 12)).astype(np.float32)}, {"x": FEEDS["vision"]["x"].numpy()})


save("text-fused", fused(load("text")))
save("text-simplified", simplified(load("text")))
save("vision-padded", padded(load("vision")))
for name in ("vision", "text"):
    save(f"{name}-half", convert_float_to_float16(load(name), keep_io_types=True))
    # 7-bit weights: with 8 bits the sums of some instruction sets saturate, and the results differ between machines.
    quantize_dynamic(HERE / f"{name}.onnx", SCRATCH / "int8.onnx", weight_type=QuantType.QInt8, reduce_range=True,
                     op_types_to_quantize=["Conv", "MatMul", "Gather"],
                     nodes_to_exclude=["/classifier/Gemm", "/classifier/Gemm_MatMul"])
    save(f"{name}-int8", onnx.load(SCRATCH / "int8.onnx"))
for name, form in (("qdq", QuantFormat.QDQ), ("qlinear", QuantFormat.QOperator)):
    quantize_static(HERE / "vision.onnx", SCRATCH / "static.onnx", calibration(), quant_format=form,
                    op_types_to_quantize=["Conv"], per_channel=True, reduce_range=True,
                    nodes_to_exclude=["/apart/Conv"])
    save(f"vision-{name}", onnx.load(SCRATCH / "static.onnx"))
config = DefaultWeightOnlyQuantConfig(block_size=16, is_symmetric=False, op_types_to_quantize=("MatMul", "Gather"))
model = in_four_bits(load("text"), algo_config=config)
model.opset_import[0].version = 17  # it writes 21, where ReduceMean differs
save("text-q4", model)


# ---- adapters

def adapter(folder, name, labels, seed, **config):
    torch.manual_seed(seed)
    model = get_peft_model(base(name, labels), LoraConfig(**({"lora_alpha": 8} | config)))
    save_adapter(randomise(model, seed, 0.5, A=0.3, B=0.2), HERE / folder, labels)


CONVS = ["stem", "point", "wide", "odd"]
ALL = ["classifier", "norm", "rms"]
adapter("adapters-vision/a", "vision", 2, 10, r=4, target_modules=[*CONVS, "fc"], modules_to_save=ALL)
adapter("adapters-vision/b", "vision", 4, 11, r=3, target_modules=["stem", "odd"], modules_to_save=ALL)
adapter("adapters-vision/c", "vision", 3, 12, r=2, target_modules=["wide", "fc"], modules_to_save=["classifier"])
adapter("adapters-vision-more/dora", "vision", 2, 13, r=4, target_modules=["stem", "point", "fc"], use_dora=True,
        modules_to_save=["classifier"])
adapter("adapters-vision-more/bias", "vision", 2, 14, r=4, target_modules=["stem", "odd"], bias="all",
        modules_to_save=["classifier"])
adapter("adapters-vision-more/norm", "vision", 2, 15, r=2, target_modules=["fc"], modules_to_save=["norm", "classifier"])
# A convolution that a task brings whole: only weights can take it.
adapter("adapters-vision-whole", "vision", 2, 16, r=2, target_modules=["fc"], modules_to_save=["apart", "classifier"])
adapter("adapters-signal/a", "signal", 2, 20, r=4, target_modules=["line", "cube"], modules_to_save=["classifier"])
adapter("adapters-signal/b", "signal", 3, 21, r=2, target_modules=["cube"], modules_to_save=["classifier"])
adapter("adapters-swapped/a", "swapped", 3, 25, r=2, target_modules=["line"], modules_to_save=["classifier"])
adapter("adapters-text/a", "text", 2, 30, r=4, target_modules=["words", "places", "query"], modules_to_save=ALL)
adapter("adapters-text/b", "text", 4, 31, r=3, target_modules=["words"], modules_to_save=["classifier", "norm"])
adapter("adapters-text/c", "text", 3, 32, r=2, target_modules=["places", "query"], modules_to_save=["classifier", "rms"])
adapter("adapters-text-more/dora", "text", 2, 33, r=4, target_modules=["words", "query"], use_dora=True,
        modules_to_save=["classifier"])


# ---- what PyTorch and PEFT answer

def adapted(name, folder):
    return PeftModel.from_pretrained(base(name, labels_of(HERE / folder)), HERE / folder)


def merged(name, folder):
    """f64. The merge of a dilated convolution is PEFT's; its unmerged one forgets the dilation, and fails."""
    if folder is None:
        return base(name).double()
    return adapted(name, folder).double().merge_and_unload().eval()


@torch.no_grad()
def answer(name, folder=None):
    feeds = {key: value.double() if value.is_floating_point() else value for key, value in FEEDS[name].items()}
    found = merged(name, folder)(**feeds)
    if folder is not None and "wide" not in json.loads((HERE / folder / "adapter_config.json").read_text())["target_modules"]:
        assert (adapted(name, folder).double().eval()(**feeds) - found).abs().max() < 1e-9
    return found.float().numpy()


def tasks(folder):
    return {path.name: f"{folder}/{path.name}" for path in sorted((HERE / folder).iterdir())}


def run(model, feeds):
    return answer_of(model, feeds, optimise=False)


def wired(model, name, folder):
    """
    A copy of a model in which every adapted layer adds PEFT's whole delta, applied to the float value that enters, to the float
    value that comes out; norms have the task's weights; the head is a float Gemm of the task.
    """
    model = onnx.ModelProto.FromString(model.SerializeToString())
    graph = model.graph
    task, own = merged(name, folder).float().state_dict(), STATES[name]
    made = producers(model)
    nodes = {node.name: node for node in graph.node}
    after = lambda value: [node for node in graph.node if value in node.input]
    added = []

    def result(op):
        """The float value that comes out."""
        value = op.output[0]
        for kinds in (["Cast", "Mul"], ["QuantizeLinear", "DequantizeLinear"], ["DequantizeLinear"]):
            at = value
            for kind in kinds:
                following = after(at)
                at = following[0].output[0] if len(following) == 1 and following[0].op_type == kind else None
                if at is None:
                    break
            if at is not None and (kinds[0] != "Cast" or op.op_type.endswith("Integer")):
                return at
        return value

    def put(y, node):
        """What reads y reads the sum with what the node makes."""
        for consumer in after(y):
            consumer.input[:] = [f"{y} sum" if value == y else value for value in consumer.input]
        added.extend([node, helper.make_node("Add", [y, node.output[0]], [f"{y} sum"])])

    for key, value in task.items():
        module, part = key.rsplit(".", 1)
        if module == "classifier" or torch.equal(value, own[key]):
            continue
        if module in ("norm", "rms"):
            old = initializers(model)[key]
            assert old.data_type == TensorProto.FLOAT
            graph.initializer.remove(old)
            constant(model, key, value)
            continue
        assert part == "weight"
        kinds = ("Conv", "MatMul", "Gather")
        op = next(nodes[found] for kind in kinds for suffix in ("", "_quant", "_Q4")
                  if (found := f"/{module}/{kind}{suffix}") in nodes)
        delta = value.double() - own[key].double()
        y, out = result(op), f"{module} term"
        weight = constant(model, f"{module} delta", (delta.T if op.op_type.startswith("MatMul") else delta).float())
        if "Gather" in op.op_type:
            put(y, helper.make_node("Gather", [weight, op.input[1]], [out]))
            continue
        x = op.input[0]
        if made[x].op_type in ("QuantizeLinear", "DynamicQuantizeLinear") if x in made else False:
            x = made[x].input[0]
        if "Conv" in op.op_type:
            geometry = [a for a in op.attribute if a.name in ("dilations", "kernel_shape", "pads", "strides", "auto_pad")]
            node = helper.make_node("Conv", [x, weight], [out])
            node.attribute.extend(geometry)
        else:
            node = helper.make_node("MatMul", [x, weight], [out])
        put(y, node)
    head = [constant(model, f"task {part}", task[f"classifier.{part}"]) for part in ("weight", "bias")]
    # The input of the head's first node: quantisers turn a Gemm into a MatMul and an Add.
    first = next(node for node in graph.node if node.name in ("/classifier/Gemm", "/classifier/Gemm_MatMul"))
    made["logits"].output[0] = "old logits"
    added.append(helper.make_node("Gemm", [first.input[0], *head], ["logits"], transB=1))
    del graph.output[0].type.tensor_type.shape.dim[:]
    del graph.value_info[:]
    return set_ordered(model, [*graph.node, *added])


def wiredAnswers(name):
    key = name.split("-")[0]
    model = load(name)
    return {"base": run(model, FEEDS[key])} | {
        task: run(wired(model, key, folder), FEEDS[key]) for task, folder in tasks(f"adapters-{key}").items()}


outputs = {"vision-whole": {"adapters-vision-whole": answer("vision", "adapters-vision-whole")}}
outputs |= {name: {"base": answer(name)} | {task: answer(name, folder)
                                            for folders in (f"adapters-{name}", f"adapters-{name}-more")
                                            if (HERE / folders).exists()
                                            for task, folder in tasks(folders).items()} for name in MAKE}
models = {"vision": "vision", "vision-dynamo": "vision", "vision-half": "vision", "signal": "signal", "swapped": "swapped", "text": "text",
          "text-fused": "text", "text-simplified": "text", "text-half": "text"}
for name in ("vision-int8", "vision-qdq", "vision-qlinear", "vision-padded", "text-int8", "text-q4"):
    models[name] = name
    outputs[name] = wiredAnswers(name)
for name, key in models.items():
    of = name.split("-")[0]
    error = np.abs(run(load(name), FEEDS[of]) - outputs[key]["base"]).max()
    print(f"{name}: {error:.2g} off {key}")
    assert error < (1e-2 if "half" in name else 1e-5)
for name in MAKE:  # `wired` itself
    for task, found in wiredAnswers(name).items():
        assert np.abs(found - outputs[name][task]).max() < 2e-5, (name, task)
for name, found in ((name, found) for name, found in outputs.items() if "base" in found):
    for task, values in found.items():
        if task != "base" and values.shape == found["base"].shape:
            assert np.abs(values - found["base"]).max() > 0.05, (name, task)
        if name.split("-")[0] != name:
            away = np.abs(values - outputs[name.split("-")[0]][task]).max()
            print(f"{name} {task}: quantisation moves it by {away:.2g}")
            assert away < 0.9

(HERE / "goldens.json").write_text(lines({"feeds": FEEDS, "models": models, "outputs": outputs}) + "\n")
report(HERE)
shutil.rmtree(SCRATCH)
