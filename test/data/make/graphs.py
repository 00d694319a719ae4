"""What the scripts of tiny models for transformers.js share: exports by TorchScript, decoders merged as Optimum does it, adapters as PEFT
saves them. Not run by itself.
"""
import io, json, pathlib, shutil, tempfile
import onnx, torch
from onnx import TensorProto, helper
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors


def exported(module, feeds, inputs, outputs):
    """A graph without stack traces, which are large and tell paths of the machine that made them."""
    buffer = io.BytesIO()
    torch.onnx.export(module, feeds, buffer, input_names=list(inputs), output_names=list(outputs), opset_version=17, dynamo=False,
                      dynamic_axes={name: axes for name, axes in {**inputs, **outputs}.items() if axes})
    graph = onnx.load_from_string(buffer.getvalue())
    for node in graph.graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    del graph.graph.value_info[:]
    return graph


def save(graph, path):
    onnx.checker.check_model(graph, full_check=True)
    path.parent.mkdir(exist_ok=True, parents=True)
    onnx.save(graph, path)


def axes(*names):
    """Axes that are free, by the order of the dimensions; a number is none."""
    return dict(enumerate(names))


def renamed(graph, names):
    """Renames values, in place."""
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    for value in [*graph.initializer, *graph.output]:
        value.name = names.get(value.name, value.name)


def merged(first, later, given, sides, shape):
    """One decoder of two, as Optimum merges them: an If, and the weights of both outside, once.

    given: names of inputs before the cache. sides: of the cache, "0.decoder.key", … shape: (kind, name) → dimensions of a value, where
    kind is "past" or "total".
    """
    key = lambda tensor: (tensor.data_type, *tensor.dims, tensor.raw_data)
    weights = {key(tensor): tensor for tensor in later.graph.initializer}
    taken = {tensor.name for tensor in later.graph.initializer}
    names = {}
    for tensor in first.graph.initializer:
        known = weights.get(key(tensor))
        name = known.name if known else f"{tensor.name}_first" if tensor.name in taken else tensor.name
        if known is None:
            weights[key(tensor)] = tensor
        names[tensor.name] = name
    renamed(first.graph, names)
    branches = []
    for suffix, graph in (("", later.graph), ("_first", first.graph)):
        renamed(graph, {output.name: f"{output.name}_branch{suffix}" for output in graph.output})
        outputs = [helper.make_tensor_value_info(output.name, output.type.tensor_type.elem_type, None) for output in graph.output]
        branches.append(helper.make_graph(list(graph.node), f"branch{suffix}", [], outputs))
    outputs = ["logits", *(f"present.{side}" for side in sides)]
    node = helper.make_node("If", ["use_cache_branch"], outputs, "optimum::if", then_branch=branches[0], else_branch=branches[1])
    flag = helper.make_tensor_value_info("use_cache_branch", TensorProto.BOOL, [1])
    values = lambda kind, names: [helper.make_tensor_value_info(name, TensorProto.INT64 if name.endswith(("ids", "mask")) else
                                                                TensorProto.FLOAT, shape(kind, name)) for name in names]
    inputs = [*given, *(f"past_key_values.{side}" for side in sides)]
    graph = helper.make_graph([node], "merged", [*values("past", inputs), flag], values("total", outputs), list(weights.values()))
    return helper.make_model(graph, opset_imports=list(first.opset_import), ir_version=first.ir_version)


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


def write(path, value):
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def save_adapters(adapted, names, folder):
    """As PEFT saves them, target modules in a fixed order."""
    shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory() as saved:
        adapted.save_pretrained(saved)
        for name in names:
            (folder / name).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(pathlib.Path(saved, name, "adapter_model.safetensors"), folder / name / "adapter_model.safetensors")
            config = json.loads(pathlib.Path(saved, name, "adapter_config.json").read_text())
            write(folder / name / "adapter_config.json", config | {"target_modules": sorted(config["target_modules"])})
