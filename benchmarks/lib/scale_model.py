"""A language model of a real shape with seeded random weights, as onnxruntime-genai's model builder writes it in 4 bits, and LoRAs of it.

Makes FOLDER/model (FORM q4) or FOLDER/model-q4f16, each with model.onnx and model.onnx.data, and FOLDER/KIND/00 to 19, PEFT adapters of rank 16
on all seven kinds of linear layers, f16:
shared   A is one start that all tasks were trained from, moved by 3 % of its norm; B is each task's own
apart    nothing is shared
Singular values of B fall, as those of trained LoRAs do. A folder that is there is left alone.

usage: python scale_model.py FOLDER SIZE FORM    (onnxruntime-genai, onnx-ir, onnx, torch, transformers, safetensors)
SIZE: 0.5b, 1.5b, 3b. FORM: q4, with all else in f32; q4f16
"""
import importlib.util, json, os, pathlib, runpy, shutil, sys, types
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when onnxruntime is imported
import numpy as np, torch
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

# Qwen2.5's: layers, hidden, heads, heads of keys and values, intermediate, vocabulary.
SHAPES = {"0.5b": (24, 896, 14, 2, 4864, 151936), "1.5b": (28, 1536, 12, 2, 8960, 151936), "3b": (36, 2048, 16, 2, 11008, 151936)}
RANK, TASKS, MOVED = 16, 20, 0.03
# Folders by what is not in 4 bits, and providers that the builder writes such files for: f32, or f16.
FORMS = {"q4": ("model", "cpu"), "q4f16": ("model-q4f16", "webgpu")}


def random_model(size):
    """The same shape in f32, with weights that transformers draws, for peers."""
    layers, hidden, heads, kv, inner, vocabulary = SHAPES[size]
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
                                        num_attention_heads=heads, num_key_value_heads=kv, tie_word_embeddings=True))


def seeded_model(size):
    """The model in f16, with seeded random weights."""
    layers, hidden, heads, kv, inner, vocabulary = SHAPES[size]
    config = Qwen2Config(vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
                         num_key_value_heads=kv, max_position_embeddings=32768, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
                         pad_token_id=0, dtype=torch.float16)
    torch.manual_seed(1)
    torch.set_default_dtype(torch.float16)
    model = Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.02)
    torch.set_default_dtype(torch.float32)
    return model


def write_model(folder, size, form):
    model, vocabulary = seeded_model(size), SHAPES[size][-1]
    source = folder / "checkpoint"
    model.save_pretrained(source)
    del model
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(vocabulary)}, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="t1", eos_token="t2", pad_token="t0").save_pretrained(source)
    # The package imports its native library, which the builder does without.
    package = types.ModuleType("onnxruntime_genai")
    package.__path__ = list(importlib.util.find_spec("onnxruntime_genai").submodule_search_locations)
    sys.modules["onnxruntime_genai"] = package
    made = folder / "made"
    sys.argv = ["builder", "-i", str(source), "-o", str(made), "-p", "int4", "-e", FORMS[form][1], "-c", str(folder / "cache")]
    runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__")
    shutil.rmtree(source)
    shutil.rmtree(folder / "cache", ignore_errors=True)
    made.rename(folder / FORMS[form][0])


def modules(size):
    layers, hidden, heads, kv, inner, _ = SHAPES[size]
    keys = hidden // heads * kv
    widths = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (hidden, keys), "self_attn.v_proj": (hidden, keys),
              "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (hidden, inner), "mlp.up_proj": (hidden, inner), "mlp.down_proj": (inner, hidden)}
    return {f"model.layers.{layer}.{name}": width for layer in range(layers) for name, width in widths.items()}


def write_adapters(folder, size, kind):
    falling = (0.8 ** np.arange(RANK))[:, None].astype(np.float32)
    start = np.random.default_rng(7)
    # PEFT's start of A: uniform, within the root of 1 / in.
    starts = {name: start.uniform(-1, 1, (RANK, width)).astype(np.float32) / width**0.5 for name, (width, _) in modules(size).items()}
    config = dict(peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path="seeded", r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0,
                  bias="none", fan_in_fan_out=False, target_modules=sorted({name.split(".")[-1] for name in starts}))
    for task in range(TASKS):
        own = np.random.default_rng([ord(kind[0]), task])
        tensors = {}
        for name, (width, out) in modules(size).items():
            A = own.uniform(-1, 1, (RANK, width)).astype(np.float32) / width**0.5
            if kind == "shared":
                A = starts[name] + MOVED * A
            B = falling * own.standard_normal((RANK, out), dtype=np.float32) * 0.02
            at = f"base_model.model.{name}"
            tensors[f"{at}.lora_A.weight"] = A.astype(np.float16)
            tensors[f"{at}.lora_B.weight"] = np.ascontiguousarray(B.T.astype(np.float16))
        to = folder / kind / f"{task:02}"
        to.mkdir(parents=True, exist_ok=True)
        save_file(tensors, to / "adapter_model.safetensors")
        (to / "adapter_config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    folder, size, form = pathlib.Path(sys.argv[1]), *sys.argv[2:]
    if not (folder / FORMS[form][0]).exists():
        write_model(folder, size, form)
    for kind in ("shared", "apart"):
        if not (folder / kind / f"{TASKS - 1:02}" / "adapter_config.json").exists():
            write_adapters(folder, size, kind)
