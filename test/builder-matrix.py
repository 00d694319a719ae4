"""Tiny random LLMs in every flavour that onnxruntime-genai's model builder writes, adapters for them, and PEFT's logits.

Makes FOLDER/NAME/{model.onnx, adapters/, base.safetensors, goldens.json} for every family, precision and way of packing, and
FOLDER/matrix.json. Goldens are PEFT's, in f64, on the weights that the file holds: those that its 4 bits stand for, and its
halves for f16. Read by test/soak-builder.js.

usage: python builder-matrix.py FOLDER [--only TEXT]    (onnxruntime-genai, onnx-ir, torch, transformers, peft, onnx)
"""
import argparse, copy, importlib.util, json, os, pathlib, runpy, shutil, sys, tempfile, traceback, types, warnings
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when onnxruntime is imported
import numpy as np, onnx, torch
from onnx import numpy_helper
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from torch import nn
import transformers as T

warnings.filterwarnings("ignore")
torch.set_num_threads(1)
BUILDER = list(importlib.util.find_spec("onnxruntime_genai").submodule_search_locations)
ROWS = [[5, 9, 13, 21, 3], [33, 2, 40, 8, 17]]
COMMON = dict(vocab_size=48, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
              max_position_embeddings=64, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=0,
              attn_implementation="eager")
APART = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOGETHER = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
WIDE = dict(COMMON, head_dim=16)
# The builder rounds the root of the width, which Gemma multiplies embeddings with, to two digits: this one is whole.
GEMMA = dict(WIDE, hidden_size=64, query_pre_attn_scalar=16, sliding_window=32, hidden_activation="gelu_pytorch_tanh")
# Family: configuration, model, and the layers as the checkpoint has them.
FAMILIES = {
    "llama": (T.LlamaConfig, T.LlamaForCausalLM, WIDE, APART),
    "mistral": (T.MistralConfig, T.MistralForCausalLM, dict(WIDE, sliding_window=None), APART),
    "qwen2": (T.Qwen2Config, T.Qwen2ForCausalLM, WIDE, APART),
    "qwen3": (T.Qwen3Config, T.Qwen3ForCausalLM, WIDE, APART),
    "gemma2": (T.Gemma2Config, T.Gemma2ForCausalLM, GEMMA, APART),
    "gemma3": (T.Gemma3TextConfig, T.Gemma3ForCausalLM, GEMMA, APART),
    "phi3": (T.Phi3Config, T.Phi3ForCausalLM, dict(COMMON, num_attention_heads=2, original_max_position_embeddings=64), TOGETHER),
}
# Their caches need not be as long as the window then.
WINDOWS = {"gemma2": ["windowed_kv_cache=false"], "gemma3": ["windowed_kv_cache=false"]}
PACKED, SEPARATE, GATES = [], ["disable_qkv_fusion=true"], ["fuse_mlp_gate_up=true"]
# Products in f32: by default processors round what enters to 8 bits, which is the runtime's error and not what is looked for.
LEVEL = "int4_accuracy_level" if "int4_accuracy_level" in (pathlib.Path(BUILDER[0]) / "models/builder.py").read_text() else "accuracy_level"
INT4 = ["int4_block_size=32", f"{LEVEL}=1"]
# Name of the flavour, precision, execution provider, and further options.
FLAVOURS = [
    ("fp32", "fp32", "cpu", PACKED), ("fp32-apart", "fp32", "cpu", SEPARATE), ("fp32-gates", "fp32", "cpu", GATES),
    ("fp16-webgpu", "fp16", "webgpu", PACKED), ("fp16-webgpu-apart", "fp16", "webgpu", SEPARATE),
    ("int4", "int4", "cpu", INT4), ("int4-apart", "int4", "cpu", INT4 + SEPARATE), ("int4-gates", "int4", "cpu", INT4 + GATES),
    ("int4-webgpu", "int4", "webgpu", INT4),
]


def base(family):
    config, make, options, _ = FAMILIES[family]
    torch.manual_seed(1)
    model = make(config(**options)).eval()
    for name, parameter in model.named_parameters():
        # Gemma adds 1 to the weights of its norms.
        norm = parameter.ndim == 1 and name.endswith("weight") and "gemma" not in family
        nn.init.normal_(parameter, mean=1.0 if norm else 0.0, std=0.2)
    return model


READ = T.AutoConfig.from_pretrained


def flat(*of, **options):
    """Gemma 3's configuration as transformers 4 has it, which the builder's reader still expects."""
    config = READ(*of, **options)
    # The model reads fields of its own instead of the combined one.
    if not isinstance(config, tuple) and config.model_type == "gemma3_text" and "full_attention" in config.rope_parameters:
        config.rope_local_base_freq = config.rope_parameters["sliding_attention"]["rope_theta"]
        config.rope_theta = config.rope_parameters["full_attention"]["rope_theta"]
        config.rope_parameters = config.rope_parameters["full_attention"]
    return config


T.AutoConfig.from_pretrained = flat


def build(folder, out, precision, provider, options):
    # The package imports its native library, which the builder does without.
    sys.modules["onnxruntime_genai"] = package = types.ModuleType("onnxruntime_genai")
    package.__path__ = BUILDER
    sys.argv = ["builder", "-i", str(folder), "-o", str(out), "-p", precision, "-e", provider, "-c", str(out / "cache")]
    if options:
        sys.argv += ["--extra_options", *options]
    for name in [name for name in sys.modules if name.startswith("onnxruntime_genai.")]:
        del sys.modules[name]
    # Older versions run as a folder of scripts.
    sys.path.insert(0, BUILDER[0] + "/models")
    try:
        runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__")
    finally:
        sys.path.pop(0)


class File:
    """The weights that a file of the builder's stands for, under the names of its nodes."""

    def __init__(self, path):
        self.graph = onnx.load(path).graph
        self.tensors = {t.name: numpy_helper.to_array(t) for t in self.graph.initializer}
        self.nodes = {n.name: n for n in self.graph.node if n.op_type in ("MatMul", "MatMulNBits")}

    def weight(self, name):
        """[out, in] in f64, or None where there is no such node."""
        node = next((self.nodes[n] for n in (name + "/MatMul", name + "/MatMul_Q4", name + "/MatMulNBits") if n in self.nodes), None)
        if node is None:
            return None
        if node.op_type == "MatMul":
            return torch.tensor(self.tensors[node.input[1]].astype(np.float64).T)
        options = {a.name: a.i for a in node.attribute}
        bits, rows, columns, block = options["bits"], options["N"], options["K"], options["block_size"]
        packed, scales = self.tensors[node.input[1]], self.tensors[node.input[2]].astype(np.float64)
        values = packed if bits == 8 else np.stack([packed & 15, packed >> 4], -1)
        values = values.reshape(rows, -1, block).astype(np.float64)
        zeros = np.full((rows, values.shape[1]), 2.0 ** (bits - 1))
        if len(node.input) > 3 and node.input[3]:
            z = self.tensors[node.input[3]]
            z = z.reshape(rows, -1) if bits == 8 else np.stack([z & 15, z >> 4], -1).reshape(rows, -1)
            zeros = z[:, : values.shape[1]].astype(np.float64)
        values = (values - zeros[..., None]) * scales.reshape(rows, -1, 1)
        return torch.tensor(values.reshape(rows, -1)[:, :columns])


def as_file(model, file, family):
    """The model with the weights of the file, in f64: its halves or what its 4 bits stand for."""
    made = copy.deepcopy(model).double()
    weights = made.state_dict()
    half = any(t.data_type == onnx.TensorProto.FLOAT16 for t in file.graph.initializer)
    if half:
        for value in weights.values():
            value.copy_(value.half().double())
    config = model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = [config.num_attention_heads * head, config.num_key_value_heads * head, config.num_key_value_heads * head]
    for layer in range(config.num_hidden_layers):
        at, to = f"/model/layers.{layer}/", f"model.layers.{layer}."
        qkv = file.weight(at + "attn/qkv_proj")
        parts = qkv.split(heads) if qkv is not None else [file.weight(f"{at}attn/{name}_proj") for name in "qkv"]
        gates = file.weight(at + "mlp/gate_up_proj")
        mlp = gates.chunk(2) if gates is not None else [file.weight(f"{at}mlp/{name}_proj") for name in ("gate", "up")]
        own = {"self_attn.o_proj": file.weight(at + "attn/o_proj"), "mlp.down_proj": file.weight(at + "mlp/down_proj")}
        if family == "phi3":
            own |= {"self_attn.qkv_proj": torch.cat(list(parts)), "mlp.gate_up_proj": torch.cat(list(mlp))}
        else:
            own |= {f"self_attn.{name}_proj": part for name, part in zip("qkv", parts)}
            own |= {"mlp.gate_proj": mlp[0], "mlp.up_proj": mlp[1]}
        for name, value in own.items():
            weights[f"{to}{name}.weight"].copy_(value)
    head = file.weight("/lm_head")
    if head is not None:
        weights["lm_head.weight"].copy_(head)
    return made


def adapt(model, layers):
    few = [layers[0], layers[2]]
    dora = [layers[1] if layers is APART else layers[0], layers[-2]]
    torch.manual_seed(4)
    adapted = None
    for id, how in {"all": dict(target_modules=layers), "few": dict(target_modules=few), "dora": dict(target_modules=dora, use_dora=True)}.items():
        config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **how)
        if adapted is None:
            adapted = get_peft_model(copy.deepcopy(model), config, adapter_name=id)
        else:
            adapted.add_adapter(id, config)
    for name, parameter in adapted.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
        if "magnitude" in name:
            parameter.data *= 1 + 0.2 * torch.rand_like(parameter)
    return adapted.eval()


@torch.no_grad()
def logits(model):
    ids = torch.tensor(ROWS)
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.flatten().tolist()


def make(family, model, adapted, folder, precision, provider, options, checkpoint):
    with tempfile.TemporaryDirectory() as out:
        build(checkpoint, pathlib.Path(out), precision, provider, options)
        onnx.save(onnx.load(pathlib.Path(out) / "model.onnx"), folder / "model.onnx")
    file = File(folder / "model.onnx")
    exact = copy.deepcopy(adapted).double()
    rounded = as_file(model, file, family).state_dict()
    for key, value in exact.named_parameters():
        if "lora_" not in key:
            # The base's part of each layer; adapters, DoRA's magnitudes too, are as they were saved.
            value.data.copy_(rounded[key.replace("base_model.model.", "").replace(".base_layer", "")])
    answers = {}
    with exact.disable_adapter():
        answers["base"] = logits(exact)
    for id in ("all", "few", "dora"):
        exact.set_adapter(id)
        answers[id] = logits(exact)
    operators = sorted({node.op_type for node in file.graph.node})
    packed = [name for name in ("qkv_proj", "gate_up_proj") if any(f"/{name}/MatMul" in node for node in file.nodes)]
    (folder / "goldens.json").write_text(json.dumps({"rows": ROWS, "logits": answers}))
    half = any(v.name == "logits" and v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16 for v in file.graph.output)
    config = model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {"precision": precision, "half": half, "cache": [config.num_key_value_heads, head], "operators": operators, "packed": packed}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    made, failed = {}, {}
    for family in FAMILIES:
        if not any(arguments.only in f"{family}-{flavour}" for flavour, *_ in FLAVOURS):
            continue
        model = base(family)
        adapted = adapt(model, FAMILIES[family][3])
        root = arguments.folder / family
        root.mkdir(parents=True, exist_ok=True)
        save_file({key: value.contiguous() for key, value in model.state_dict().items()}, root / "base.safetensors")
        adapted.save_pretrained(root / "adapters")
        with tempfile.TemporaryDirectory() as checkpoint:
            model.save_pretrained(checkpoint)
            tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(48)}, unk_token="t0"))
            T.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="t1", eos_token="t2", pad_token="t0").save_pretrained(checkpoint)
            for flavour, precision, provider, options in FLAVOURS:
                name = f"{family}-{flavour}"
                if arguments.only not in name:
                    continue
                folder = arguments.folder / name
                folder.mkdir(exist_ok=True)
                try:
                    made[name] = {"family": family, **make(family, model, adapted, folder, precision, provider, options + WINDOWS.get(family, []), checkpoint)}
                except (Exception, SystemExit) as error:
                    traceback.print_exc()
                    failed[name] = f"{type(error).__name__}: {error}"[:300]
                    shutil.rmtree(folder)
    (arguments.folder / "matrix.json").write_text(json.dumps({"made": made, "failed": failed}, indent=1))
    print("\n".join(f"{name}: {', '.join(one['packed']) or 'apart'}" for name, one in made.items()))
    print("\n".join(f"{name}: not built: {why}" for name, why in failed.items()))


main()
