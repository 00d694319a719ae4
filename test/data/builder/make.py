"""Tiny random LLMs as onnxruntime-genai's model builder writes them, adapters for them, and PEFT's logits.

The builder packs queries, keys and values into one layer, unless it is told not to, and names things its own way. goldens.json is
computed by PEFT in f64, without the exported graphs; for the 4-bit file on the base that its bytes stand for. gradients.safetensors has the gradients
for the adapter "all": of the mean over all tokens of the cross entropy with the class (7 · row + 3) mod 48.

usage: python make.py    (onnxruntime-genai 0.18, onnx-ir, torch 2.13, transformers 5, peft 0.21, onnx)
"""
import copy, importlib.util, pathlib, runpy, sys, tempfile, types
HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "make"))
from graphs import dequantised, gradients_of, initializers, with_adapters, write_rounded
import numpy as np, onnx, torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from torch import nn
from transformers import (LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM, PreTrainedTokenizerFast, Qwen2Config,
                          Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM)

BUILDER = list(importlib.util.find_spec("onnxruntime_genai").submodule_search_locations)
ROWS = [[5, 9, 13, 21, 3], [33, 2, 40, 8, 17]]
KINDS = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM),
         "small": (LlamaConfig, LlamaForCausalLM), "phi3": (Phi3Config, Phi3ForCausalLM)}
# Models of one layer; Phi-3's checkpoint has packed layers itself. The builder takes a layer with 48 outputs, the number of tokens, for
# the last one.
SMALL = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, head_dim=16)
SIZES = {"small": SMALL, "phi3": dict(SMALL, hidden_size=32, num_attention_heads=2, num_key_value_heads=2, original_max_position_embeddings=32)}
# Name of the file, the model that it is of, and what the builder is told.
FILES = [
    ("llama", "llama", ["-p", "fp32"]),
    ("llama-apart", "llama", ["-p", "fp32", "--extra_options", "disable_qkv_fusion=true"]),
    ("llama-int4", "llama", ["-p", "int4", "--extra_options", "int4_block_size=32", "accuracy_level=1"]),
    ("qwen2", "qwen2", ["-p", "fp32"]),
    ("qwen3", "qwen3", ["-p", "fp32"]),
    ("small-gates", "small", ["-p", "fp32", "--extra_options", "fuse_mlp_gate_up=true"]),
    ("phi3", "phi3", ["-p", "fp32", "--extra_options", "fuse_mlp_gate_up=true"]),
    ("phi3-apart", "phi3", ["-p", "fp32", "--extra_options", "disable_qkv_fusion=true"]),
]
ADAPTERS = {
    "all": dict(target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
    "few": dict(target_modules=["q_proj", "v_proj"]),
    "dora": dict(target_modules=["k_proj"], use_dora=True),
}
PHI3 = {
    "all": dict(target_modules=["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]),
    "few": dict(target_modules=["gate_up_proj"]),
    "dora": dict(target_modules=["qkv_proj"], use_dora=True),
}


def base(kind):
    config, model = KINDS[kind]
    torch.manual_seed(1)
    sizes = dict(vocab_size=48, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=16, max_position_embeddings=32, tie_word_embeddings=False,
                 bos_token_id=1, eos_token_id=2, pad_token_id=0, attn_implementation="eager")
    made = model(config(**{**sizes, **SIZES.get(kind, {})})).eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 and parameter.shape != (48,) else 0.0, std=0.2)
    return made


def build(folder, out, how):
    # The package imports its native library, which the builder does without.
    sys.modules["onnxruntime_genai"] = package = types.ModuleType("onnxruntime_genai")
    package.__path__ = BUILDER
    sys.argv = ["builder", "-i", str(folder), "-o", str(out), "-e", "cpu", "-c", str(out / "cache"), *how]
    runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__")


def rounded(model, file):
    """Weights that a 4-bit file stands for."""
    nodes = {n.name: n for n in file.graph.node if n.op_type == "MatMulNBits"}
    weights = copy.deepcopy(model).double().state_dict()
    read = lambda name: dequantised(nodes[name], initializers(file))
    for layer in range(2):
        at, to = f"/model/layers.{layer}/", f"model.layers.{layer}."
        q, k, v = read(at + "attn/qkv_proj/MatMul_Q4").split([64, 32, 32])
        for name, value in dict(q=q, k=k, v=v, o=read(at + "attn/o_proj/MatMul_Q4")).items():
            weights[f"{to}self_attn.{name}_proj.weight"] = value
        for name in ("gate", "up", "down"):
            weights[f"{to}mlp.{name}_proj.weight"] = read(f"{at}mlp/{name}_proj/MatMul_Q4")
    return weights | {"lm_head.weight": read("/lm_head/MatMul_Q4")}


def adapt(model, kind):
    torch.manual_seed(4)
    return with_adapters(model, PHI3 if kind == "phi3" else ADAPTERS, task_type="CAUSAL_LM", r=4, lora_alpha=8)


def logits(model):
    ids = torch.tensor(ROWS)
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits


answers, gradients, saved = {}, {}, set()
for name, kind, how in FILES:
    model = base(kind)
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        model.save_pretrained(folder / "in")
        tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(48)}, unk_token="t0"))
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="t1", eos_token="t2", pad_token="t0").save_pretrained(folder / "in")
        build(folder / "in", folder / "out", how)
        file = onnx.load(folder / "out" / "model.onnx")
    onnx.save(file, HERE / f"{name}.onnx")
    adapted = adapt(model, kind)
    if kind not in saved:
        saved.add(kind)
        save_file({key: value.contiguous() for key, value in model.state_dict().items()}, HERE / f"{kind}.safetensors")
        adapted.save_pretrained(HERE / "adapters" / kind)
        (HERE / "adapters" / kind / "README.md").unlink(missing_ok=True)
        for id in ADAPTERS:
            (HERE / "adapters" / kind / id / "README.md").unlink(missing_ok=True)
    exact = adapted.double()
    if how[1] == "int4":
        # The base's part of each layer; adapters, DoRA's magnitudes too, are as they were saved.
        weights = rounded(model, file)
        for key, value in exact.named_parameters():
            if "lora_" not in key:
                value.data.copy_(weights[key.replace("base_model.model.", "").replace(".base_layer", "")])
    with exact.disable_adapter():
        answers[name] = {"base": logits(exact).flatten().tolist()}
    for id in ADAPTERS:
        exact.set_adapter(id)
        answers[name][id] = logits(exact).flatten().tolist()
    if name != "phi3-apart":  # the gradients are those of phi3
        exact.set_adapter("all")
        gradients |= {f"{name}/{key}": value for key, value in gradients_of(exact, logits(exact), "all", 48).items()}
write_rounded(HERE / "goldens.json", {"rows": ROWS, "logits": answers})
save_file(gradients, HERE / "gradients.safetensors")
print({name: [round(float(np.abs(v).max()), 3) for v in one.values()] for name, one in answers.items()})
