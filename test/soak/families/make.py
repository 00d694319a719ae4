"""Tiny models of many families, two PEFT adapters for each, its exports to ONNX, and what PEFT answers: what test/soak/families.js runs.

Weights are random, from fixed seeds; nothing is downloaded. Every family becomes a folder: family.json (feeds, answers, what there is),
base.safetensors, adapters/a and adapters/b, and the ONNX files. Answers are computed in f64 by PyTorch and PEFT, without the exports; those
of a file in 4 or 8 bits on the base that its bytes stand for.

usage: python make.py FOLDER [FAMILY...]    python make.py --list
(torch 2.13, transformers 5.24, peft 0.21, diffusers 0.42, onnx 1.23, onnxscript 0.7, onnxruntime 1.32)
"""
import ast, gc, json, logging, os, pathlib, re, shutil, sys, tempfile, time, warnings
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when onnxruntime is imported
import numpy as np, onnx, torch
from onnx import numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from onnxruntime.transformers.float16 import convert_float_to_float16
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from models import FAMILIES  # noqa: E402

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)
torch.set_num_threads(1)
TASKS = ["a", "b"]
# A task that changes less than this part of the largest number would pass unnoticed where tolerances are loose.
LEAST_EFFECT = 0.02
# Nor may rounding in f32 by itself use up what the check allows.
MOST_ROUNDING = 5e-6
BLOCK = 16


# ---- models and adapters

def base(family):
    torch.manual_seed(family.seed)
    model = family.build().eval()
    generator = torch.Generator().manual_seed(family.seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            # Wide enough that layers matter next to the residual stream, for any initialisation of the family.
            parameter.data = family.gain * noise / max(1.0, float(np.prod(parameter.shape[1:]))) ** 0.5
        else:
            parameter.data = parameter.data + 0.1 * noise
    return model


def fill(peft, seed):
    """All that is trained is random, and large enough to matter."""
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in peft.named_parameters():
        if not parameter.requires_grad or "original_module" in key:
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        if "magnitude" in key:
            parameter.data = (1 + 0.2 * noise) * parameter
        elif "lora_" in key:
            parameter.data = 0.6 * noise / max(1.0, float(np.prod(parameter.shape[1:]))) ** 0.5
        else:
            parameter.data = parameter + 0.1 * noise


def adapters(family, folder):
    """Saved as PEFT saves them, each from a base of its own."""
    for index, task in enumerate(TASKS):
        config = {"lora_alpha": 6, "r": 3 + 2 * index} | family.adapters[task]
        peft = get_peft_model(base(family), LoraConfig(**config))
        fill(peft, 10 + index)
        path = folder / "adapters" / task
        peft.save_pretrained(path)
        saved = json.loads((path / "adapter_config.json").read_text()) | {"base_model_name_or_path": f"tiny-{family.name}"}
        (path / "adapter_config.json").write_text(json.dumps(saved, indent=1) + "\n")


def module_at(model, path):
    return model.get_submodule(path) if path else model


def answer(model, part, feeds):
    module = module_at(model, part.module)
    with torch.no_grad():
        return part.call(getattr(module, part.method), feeds)


def in_f64(feeds):
    return {name: value.double() if value.is_floating_point() else value for name, value in feeds.items()}


def answers(family, folder, replace=None):
    """By part and task. `replace` puts other weights into a base, in place."""
    found = {name: {} for name in family.parts}
    for task in ["base", *TASKS]:
        model = base(family)
        if replace:
            replace(model)
        if task != "base":
            model = PeftModel.from_pretrained(model, folder / "adapters" / task).eval().get_base_model()
        single = {name: answer(model, part, part.feeds()) for name, part in family.parts.items()} if not replace else None
        model = model.double()
        for name, part in family.parts.items():
            exact = answer(model, part, in_f64(part.feeds()))
            assert torch.isfinite(exact).all(), (family.name, name, task)
            largest = exact.abs().max()
            if single:
                rounding = float((single[name] - exact).abs().max() / largest)
                assert rounding < MOST_ROUNDING, f"{family.name} {name} {task}: f32 is off by {rounding:.1e}"
            if task != "base":
                effect = float((exact - found[name]["base"]).abs().max() / largest)
                assert effect > LEAST_EFFECT, f"{family.name} {name} {task}: changes only {effect:.1e}"
            found[name][task] = exact
    return {name: {task: value.float() for task, value in tasks.items()} for name, tasks in found.items()}


# ---- exports

def exportable(family, part, attention):
    """The part as a module whose forward takes its feeds in order: patched in place, so that paths in names are those of the checkpoint."""
    model = base(family)
    if attention and hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation(attention)
    module = module_at(model, part.module)
    kind, names = type(module), list(part.feeds())
    scope = {"part": part, "plain": getattr(kind, part.method)}
    given = ", ".join(f"{name}={name}" for name in names)
    exec(f"def forward(self, {', '.join(names)}):\n"
         f"    return part.call(lambda **own: plain(self, **own), dict({given}))", scope)
    module.__class__ = type(kind.__name__, (kind,), {"forward": scope["forward"]})
    return module


def torchscript(family, part, path):
    feeds = part.feeds()
    axes = {name: dict(free) for name, free in part.axes.items()}
    with torch.no_grad():
        torch.onnx.export(exportable(family, part, family.attention), tuple(feeds.values()), path, dynamo=False, opset_version=17,
                          input_names=list(feeds), output_names=[part.output], dynamic_axes=axes)


def dynamo(family, part, path):
    feeds = part.feeds()
    free = {axis for axes in part.axes.values() for axis in axes.values()}
    dims = {axis: torch.export.Dim.AUTO if part.automatic else torch.export.Dim(axis) for axis in free}
    shapes = {name: {at: dims[axis] for at, axis in part.axes.get(name, {}).items()} for name in feeds}
    with torch.no_grad():
        torch.onnx.export(exportable(family, part, None), tuple(feeds.values()), path, dynamo=True, external_data=False,
                          verbose=False, input_names=list(feeds), output_names=[part.output], dynamic_shapes=shapes)


def lean(path):
    """Without stack traces, which are many times the size of a tiny model."""
    model = onnx.load(path)
    for node in model.graph.node:
        node.doc_string = ""
        keep = [entry for entry in node.metadata_props if entry.key == "pkg.torch.onnx.name_scopes"]
        del node.metadata_props[:]
        node.metadata_props.extend(keep)
    onnx.save(model, path)
    return model


def named(model):
    """As docs/export.md does it: quantisers forget dynamo's notes, and names of nodes stay."""
    for i, node in enumerate(model.graph.node):
        for entry in node.metadata_props:
            if entry.key == "pkg.torch.onnx.name_scopes" and node.op_type in ("MatMul", "Gemm"):
                node.name = "/" + ast.literal_eval(entry.value)[-2].replace(".", "/") + f"/{node.op_type}_{i}"
    return model


def in_f16(source, path):
    onnx.save(convert_float_to_float16(onnx.load(source), keep_io_types=True), path)


def in_4_bits(source, path):
    quantizer = MatMulNBitsQuantizer(named(onnx.load(source)), bits=4, block_size=BLOCK, is_symmetric=True)
    quantizer.process()
    quantizer.model.save_model_to_file(str(path), use_external_data_format=False)


def in_8_bits(source, path):
    onnx.save(named(onnx.load(source)), path)
    # 7-bit weights: with 8 bits the sums of some instruction sets saturate.
    quantize_dynamic(path, path, weight_type=QuantType.QInt8, per_channel=True, reduce_range=True, op_types_to_quantize=["MatMul"])


EXPORTERS = {"torchscript": torchscript, "dynamo": dynamo}
FORMATS = {"f16": in_f16, "q4": in_4_bits, "int8": in_8_bits}


def quantised(path):
    """Matrices [out, in] that a file in 4 or 8 bits stands for, with the largest step of each."""
    graph = onnx.load(path).graph
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "MatMulNBits":
            size = {a.name: a.i for a in node.attribute}
            packed, scales = (tensors[name] for name in node.input[1:3])
            values = np.stack([packed & 15, packed >> 4], -1).reshape(size["N"], -1, size["block_size"]).astype(np.float64) - 8
            yield (values * scales.reshape(size["N"], -1, 1)).reshape(size["N"], -1)[:, :size["K"]], scales.max()
        if node.op_type == "MatMulInteger" and node.input[1] in tensors:
            stem = node.input[1].removesuffix("_quantized")
            scale, zero = tensors[f"{stem}_scale"], tensors[f"{stem}_zero_point"]
            yield ((tensors[node.input[1]].astype(np.float64) - zero) * scale).T, scale.max()


def replacing(paths):
    """Puts the weights that files stand for in the place of the float ones that they are near to: found by values, not by names."""
    known = [one for path in paths for one in quantised(path)]
    assert known, paths

    def replace(model):
        count = 0
        for module in list(model.modules()):
            weight = getattr(module, "weight", None)
            if isinstance(module, nn.Embedding) or weight is None or weight.ndim != 2:
                continue
            turned = type(module).__name__ == "Conv1D"
            own = (weight.T if turned else weight).detach().numpy()
            for matrix, step in known:
                if matrix.shape == own.shape and np.abs(matrix - own).max() <= step * 1.001:
                    module.weight = nn.Parameter(torch.tensor(matrix.T if turned else matrix, dtype=torch.float32))
                    count += 1
                    break
        assert count >= len({matrix.tobytes() for matrix, _ in known}), (paths, count, len(known))
    return replace


# ---- names of former versions

def checkpoint(family, path):
    """The base as it lies on the hubs: transformers saves names of the version that began with the model. Those of modules that are
    called otherwise now, by what they are called now."""
    model = base(family)
    state = {name: value.contiguous().clone() for name, value in model.state_dict().items()}
    if not isinstance(model, PreTrainedModel):
        save_file(state, path)
        return {}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        shutil.copyfile(pathlib.Path(folder) / "model.safetensors", path)
    saved = {(tuple(value.shape), value.numpy().tobytes()): name for name, value in load_file(path).items()}
    pairs = ((name, saved.get((tuple(value.shape), value.numpy().tobytes()), name)) for name, value in state.items() if value.ndim > 1)
    # Tied weights are saved once, by a name that there is now.
    return {now.removesuffix(".weight"): former.removesuffix(".weight") for now, former in pairs if former not in state}


def renamed(former, part, source, path):
    """An export as a former version would have made it: its names, and the modules that nodes are named by."""
    model = onnx.load(source)
    front = f"{part.module}." if part.module else ""
    names = {now.removeprefix(front): old for now, old in former.items() if now.startswith(front)}
    values = {f"{now}.{leaf}": f"{old}.{leaf}" for now, old in names.items() for leaf in ("weight", "bias")}
    for node in model.graph.node:
        node.input[:] = [values.get(value, value) for value in node.input]
        place, _, own = node.name.rpartition("/")
        dotted = place.strip("/").replace("/", ".")
        if dotted in names:
            node.name = "/" + re.sub(r"\.(?!\d)", "/", names[dotted]) + f"/{own}"
    for tensor in model.graph.initializer:
        tensor.name = values.get(tensor.name, tensor.name)
    onnx.save(model, path)


# ---- a family's folder

def plain(value):
    data = value.flatten()
    if value.is_floating_point():
        return [float(f"{number:.9g}") for number in data.tolist()]
    return [int(number) for number in data.tolist()]


def described(feeds):
    types = {torch.int64: "int64", torch.float32: "float32", torch.bool: "bool"}
    return {name: {"type": types[value.dtype], "dims": list(value.shape), "data": plain(value)} for name, value in feeds.items()}


def goldens(found):
    return {name: {task: plain(value) for task, value in tasks.items()} for name, tasks in found.items()}


def make(family, root):
    folder = root / family.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    adapters(family, folder)
    former = checkpoint(family, folder / "base.safetensors")
    exports = []
    for exporter in family.exporters:
        files = {name: f"{exporter}-{name}.onnx" for name in family.parts}
        for name, part in family.parts.items():
            EXPORTERS[exporter](family, part, folder / files[name])
            lean(folder / files[name])
        exports.append({"exporter": exporter, "format": "f32", "files": files})
        for form in family.formats.get(exporter, ()):
            others = {name: f"{exporter}-{name}-{form}.onnx" for name in family.parts}
            for name in family.parts:
                FORMATS[form](folder / files[name], folder / others[name])
            made = {"exporter": exporter, "format": form, "files": others}
            if form != "f16":
                made["goldens"] = goldens(answers(family, folder, replacing([folder / file for file in others.values()])))
            exports.append(made)
        if former and exporter == "torchscript":
            others = {name: f"former-{name}.onnx" for name in family.parts}
            for name, part in family.parts.items():
                renamed(former, part, folder / files[name], folder / others[name])
            exports.append({"exporter": "transformers 4", "format": "f32", "files": others})
    parts = {name: {"feeds": described(part.feeds()), "output": part.output} for name, part in family.parts.items()}
    (folder / "family.json").write_text(json.dumps(
        {"name": family.name, "title": family.title, "tasks": TASKS, "parts": parts, "goldens": goldens(answers(family, folder)),
         "exports": exports}))


if __name__ == "__main__":
    if sys.argv[1:] == ["--list"]:
        print("\n".join(FAMILIES))
        sys.exit()
    root, chosen = pathlib.Path(sys.argv[1]), sys.argv[2:] or list(FAMILIES)
    for name in chosen:
        began = time.time()
        make(FAMILIES[name], root)
        gc.collect()
        print(f"{name}: made in {time.time() - began:.0f} s", flush=True)
