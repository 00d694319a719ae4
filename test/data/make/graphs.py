"""What the scripts of this folder share: exports, changes of graphs, adapters as PEFT saves them, runs of onnxruntime. Not run by itself."""
import copy, io, json, logging, os, pathlib, re, shutil, tempfile, warnings
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when onnxruntime is imported: scripts import this file first
import numpy as np, onnx, torch
from onnx import numpy_helper
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)
torch.set_num_threads(1)


# ---- exports

SCOPES = "pkg.torch.onnx.name_scopes"


def without_traces(model, keep=lambda key: key != "pkg.torch.onnx.stack_trace"):
    """The model without stack traces, which are large and tell paths of the machine that made them. keep: metadata of nodes that stays, by key."""
    for node in model.graph.node:
        node.doc_string = ""
        kept = [entry for entry in node.metadata_props if keep(entry.key)]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)
    return model


def cleaned(model, keep=("namespace", SCOPES), values=True):
    """The model without metadata but these of its nodes. values: whether the shapes of inner values stay."""
    g = without_traces(model, lambda key: key in keep).graph
    for thing in [model, g, *g.input, *g.output, *g.value_info, *g.initializer]:
        del thing.metadata_props[:]
    if not values:
        del g.value_info[:]
    return model


class Exported(torch.nn.Module):
    """A call of a model, whose children it has, so that nodes and weights get the paths of the checkpoint. only: those that the call uses."""

    def __init__(self, model, call, only=None):
        super().__init__()
        for name, child in model.named_children():
            if only is None or name in only:
                self.add_module(name, child)
        for name, parameter in model.named_parameters(recurse=False) if only is None else ():
            self.register_parameter(name, parameter)
        # The exporter leaves modules in the mode in which it finds this one.
        self.train(model.training)
        self.__dict__["call"] = call

    def forward(self, *given):
        return self.__dict__["call"](*given)


def torchscript(module, feeds, inputs, outputs, opset=17):
    """By torch's older exporter. inputs, outputs: names → free axes."""
    buffer = io.BytesIO()
    torch.onnx.export(module, feeds, buffer, input_names=list(inputs), output_names=list(outputs), opset_version=opset, dynamo=False,
                      dynamic_axes={name: axes for name, axes in {**inputs, **outputs}.items() if axes})
    return onnx.load_from_string(buffer.getvalue())


def dynamo(module, feeds, **how):
    """By torch's newer exporter."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "model.onnx")
        torch.onnx.export(module, feeds, path, dynamo=True, external_data=False, verbose=False, **how)
        return onnx.load(path)


def exported(module, feeds, inputs, outputs, opset=17):
    return cleaned(torchscript(module, feeds, inputs, outputs, opset), keep=(), values=False)


def save(graph, path):
    onnx.checker.check_model(graph, full_check=True)
    path.parent.mkdir(exist_ok=True, parents=True)
    onnx.save(graph, path)


def axes(*names):
    """Axes that are free, by the order of the dimensions; a number is none."""
    return dict(enumerate(names))


# ---- graphs and their runs

def initializers(model):
    return {tensor.name: tensor for tensor in model.graph.initializer}


def producers(model):
    return {output: node for node in model.graph.node for output in node.output}


def set_nodes(model, nodes):
    nodes = list(nodes)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def set_ordered(model, nodes):
    """ONNX wants nodes in the order of computation."""
    graph, ordered = model.graph, []
    known = {value.name for value in (*graph.input, *graph.initializer)} | {""}
    while nodes:
        ready = [node for node in nodes if known.issuperset(node.input)]
        assert ready, [node.name for node in nodes]
        ordered += ready
        known.update(output for node in ready for output in node.output)
        nodes = [node for node in nodes if not known.issuperset(node.output)]
    return set_nodes(model, ordered)


def constant(model, name, tensor):
    """Adds an initializer. Returns its name."""
    model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(tensor.numpy()), name))
    return name


def dequantised(node, tensors):
    """The weight [N, K] that a MatMulNBits means: 4 bits, offset 8, low nibble first, a scale per block of a row."""
    attributes = {a.name: a.i for a in node.attribute}
    assert attributes["bits"] == 4 and len([name for name in node.input if name]) == 3
    packed, scales = (numpy_helper.to_array(tensors[name]) for name in node.input[1:3])
    N, K, block = (attributes[name] for name in ("N", "K", "block_size"))
    values = np.stack([packed & 15, packed >> 4], -1).reshape(N, -1, block).astype(np.float64) - 8
    return torch.tensor((values * scales.reshape(N, -1, 1)).reshape(N, -1)[:, :K])


def in_four_bits(model, **how):
    """Matrices as MatMulNBits."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
    quantizer = MatMulNBitsQuantizer(model, **how)
    quantizer.process()
    return quantizer.model.model


class Calibration:
    """Feeds of a static quantisation, as onnxruntime's quantiser reads them."""
    def __init__(self, *batches):
        self.batches = iter(batches)

    def get_next(self):
        return next(self.batches, None)


def answer_of(model, feeds, optimise=True):
    """The first output by onnxruntime. Without its fusions operators are as ONNX defines them; with them, integers may round differently."""
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimise else levels.ORT_DISABLE_ALL
    source = str(model) if isinstance(model, pathlib.Path) else model.SerializeToString()
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    wanted = {value.name for value in session.get_inputs()}
    return session.run(None, {key: value.numpy() for key, value in feeds.items() if key in wanted})[0]


# ---- models of transformers.js

def characters(special, end=None, more=()):
    """One token per printable ASCII character after the special ones, written as byte-level BPE that merges nothing; an end is added
    where there is one."""
    tokens = [*special, *(chr(code) for code in range(33, 127)), "Ġ", *more]
    made = Tokenizer(models.BPE({token: id for id, token in enumerate(tokens)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([*special, *more])
    if end is not None:
        made.post_processor = processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, made.token_to_id(end))])
    return made


# ---- adapters

def with_state(model, state):
    """A head of another size stays as it is: every task brings its own."""
    own = model.state_dict()
    model.load_state_dict({name: value if value.shape == own[name].shape else own[name] for name, value in state.items()})
    return model


def randomise(model, seed, other, A=None, B=None):
    """Makes all that is trained random, and large enough to matter. Factors without a size of their own are changed as heads, biases and norms are."""
    random = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or "original_module" in name:
            continue
        noise = torch.randn(parameter.shape, generator=random)
        size = A if re.search("lora_(embedding_)?A", name) else B if re.search("lora_(embedding_)?B", name) else None
        if "lora_magnitude" in name:
            parameter.data *= 1 + 0.5 * noise
        else:
            parameter.data = size * noise if size else parameter.data + other * noise
    return model


def with_adapters(model, adapters, std=0.2, **how):
    """A copy of a model with adapters of these configurations by name, random on both sides (PEFT starts B at zero)."""
    adapted = None
    for name, config in adapters.items():
        config = LoraConfig(**how, **config)
        if adapted is None:
            adapted = get_peft_model(copy.deepcopy(model), config, adapter_name=name)
        else:
            adapted.add_adapter(name, config)
    for name, parameter in adapted.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1 + 0.2 * torch.rand_like(parameter)
        elif "lora_" in name:
            torch.nn.init.normal_(parameter, std=std)
        elif "modules_to_save" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return adapted.eval()


def save_adapter(model, path, labels):
    """As PEFT saves it, lists in a fixed order; and names of labels."""
    shutil.rmtree(path, ignore_errors=True)
    model.save_pretrained(path)
    (path / "README.md").unlink()
    file = path / "adapter_config.json"
    saved = json.loads(file.read_text()) | {"base_model_name_or_path": "tiny-random"}
    for key in ("target_modules", "modules_to_save"):
        saved[key] = saved[key] and sorted(saved[key])
    file.write_text(json.dumps(saved, indent=1, sort_keys=True) + "\n")
    (path / "task.json").write_text(json.dumps({"labels": [f"{path.name} {i}" for i in range(labels)]}) + "\n")


def labels_of(path):
    return len(json.loads((path / "task.json").read_text())["labels"])


def write(path, value):
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def save_adapters(adapted, names, folder, **more):
    """Several as PEFT saves them, target modules in a fixed order. more: of the configuration."""
    shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory() as saved:
        adapted.save_pretrained(saved)
        for name in names:
            (folder / name).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(pathlib.Path(saved, name, "adapter_model.safetensors"), folder / name / "adapter_model.safetensors")
            config = json.loads(pathlib.Path(saved, name, "adapter_config.json").read_text())
            write(folder / name / "adapter_config.json", config | {"target_modules": sorted(config["target_modules"])} | more)


def save_targets(model, adapted, path):
    """Only the weights that are adapted: fingerprints need no others."""
    targets = {name.removesuffix(".lora_A").removeprefix("base_model.model.") for name, _ in adapted.named_modules() if name.endswith(".lora_A")}
    save_file({f"{name}.weight": model.get_submodule(name).weight.detach().clone() for name in sorted(targets)}, path)


# ---- answers

def lines(value, indent=""):
    """JSON with a line per name and array."""
    if isinstance(value, dict):
        inner = f"{indent} "
        return "{\n" + ",\n".join(f'{inner}"{k}": {lines(v, inner)}' for k, v in value.items()) + f"\n{indent}}}"
    if isinstance(value, str):
        return json.dumps(value)
    digits = lambda v: [digits(x) for x in v] if isinstance(v, list) else v if isinstance(v, int) else float(f"{v:.9g}")
    return json.dumps(digits(value.tolist()), separators=(",", ":"))


def write_rounded(path, goldens, digits=8):
    path.write_text(json.dumps(json.loads(json.dumps(goldens), parse_float=lambda text: round(float(text), digits))) + "\n")


def gradients_of(adapted, logits, adapter, classes):
    """The loss, the mean over all tokens of the cross entropy with the class (7 · row + 3) mod `classes`, and its gradients for an adapter's factors."""
    logits = logits.flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, (7 * torch.arange(len(logits)) + 3) % classes)
    factors = {name: value for name, value in adapted.named_parameters() if f".{adapter}.weight" in name and "lora_" in name}
    found = {"loss": loss.detach().float().reshape(1)}
    for name, gradient in zip(factors, torch.autograd.grad(loss, factors.values())):
        found[name.replace("base_model.model.", "").replace(f".{adapter}.weight", "")] = gradient.float().contiguous()
    return found


def report(folder):
    """Prints the sizes of all files, none of which may tell paths of the machine that made them."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    for path in files:
        print(f"{path.stat().st_size:8} {path.relative_to(folder)}")
        if path.name not in ("make.py", "README.md"):
            assert not re.search(rb"site-packages|/tmp/|/home/|\.py\b", path.read_bytes()), path
    print(f"{sum(path.stat().st_size for path in files):8} in all")
