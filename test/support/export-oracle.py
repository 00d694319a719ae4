"""What the tools that define adapter formats make of exported adapters: diffusers, LyCORIS' rule for kohya, gguf-py, ONNX Runtime.

usage: export-oracle.py GOLDENS EXPORTED
EXPORTED holds the files named in CHECKS. Prints one JSON object: file ->
largest difference from the golden merge over the largest |W| of its tensor, or what went wrong. Exits with 3 when a package cannot be imported.
"""
import json, os, pathlib, sys, warnings

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when onnxruntime is imported
warnings.filterwarnings("ignore")
try:
    import gguf
    import numpy as np
    import onnxruntime
    import torch
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from safetensors.numpy import load_file as load_arrays
    from safetensors.torch import load_file
except ImportError as missing:
    print(missing, file=sys.stderr)
    sys.exit(3)

GOLDENS, EXPORTED = map(pathlib.Path, sys.argv[1:])


def differences(merged, expected):
    return max(float(np.abs(merged[key] - value).max() / np.abs(value).max()) for key, value in expected.items())


def unet(**more):
    return UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), **more,
    )


def in_diffusers(name, model, golden):
    """diffusers' own loading and PEFT's merge."""
    base = {key.removeprefix("unet."): value for key, value in load_file(GOLDENS / golden / "base.safetensors").items()}
    missing, unexpected = model.load_state_dict(base, strict=False)
    assert not unexpected, unexpected
    state, alphas, metadata = StableDiffusionPipeline.lora_state_dict(str(EXPORTED), weight_name=name, return_lora_metadata=True)
    StableDiffusionPipeline.load_lora_into_unet(state, network_alphas=alphas, unet=model, metadata=metadata)
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
    merged = {key.replace(".base_layer", ""): value.numpy() for key, value in model.state_dict().items()}
    expected = {key.removeprefix("unet."): value for key, value in load_arrays(GOLDENS / golden / "merged.safetensors").items()}
    return differences(merged, expected)


def in_kohya(name):
    """alpha / rank, of every module by itself; a DoRA scale over outputs."""
    state = load_arrays(EXPORTED / name)
    expected = load_arrays(GOLDENS / "locon-dora" / "merged.safetensors")
    merged = {}
    for key, base in load_arrays(GOLDENS / "locon-dora" / "base.safetensors").items():
        model, module = key.removesuffix(".weight").split(".", 1)
        flat = {"unet": "lora_unet_", "text_encoder": "lora_te1_"}[model] + module.replace(".", "_")
        down, up, alpha, magnitude = (state[f"{flat}.{part}"] for part in ("lora_down.weight", "lora_up.weight", "alpha", "dora_scale"))
        rows = up.reshape(len(up), -1).astype(np.float64) @ down.reshape(len(down), -1) * (float(alpha) / len(down))
        weight = base.reshape(len(base), -1) + rows
        scaled = weight / np.linalg.norm(weight, axis=1, keepdims=True) * magnitude.reshape(-1, 1)
        merged[key] = scaled.reshape(base.shape)
    return differences(merged, expected)


def in_llama_cpp(name):
    """gguf-py's reader, llama.cpp's scale, and the way back from its order of rows (`permute` of convert_hf_to_gguf.py)."""
    reader = gguf.GGUFReader(EXPORTED / name)
    text = {key: bytes(field.parts[field.data[0]]).decode() for key, field in reader.fields.items() if field.types == [gguf.GGUFValueType.STRING]}
    assert (text["general.architecture"], text["general.type"], text["adapter.type"]) == ("llama", "adapter", "lora"), text
    alpha = float(reader.fields["adapter.lora.alpha"].parts[-1][0])
    found = {tensor.name: np.array(tensor.data).astype(np.float64) for tensor in reader.tensors}
    names = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
             "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
    base = load_arrays(GOLDENS / "gguf" / "base.safetensors")
    merged = {}
    for key in [key for key in found if key.endswith(".lora_a")]:
        _, layer, which, *_ = key.split(".")
        a, b = found[key], found[key.replace("lora_a", "lora_b")]
        delta = (b @ a) * (alpha / len(a) if alpha else 1)
        if which in ("attn_q", "attn_k"):
            heads = 4 if which == "attn_q" else 2
            delta = delta.reshape(heads, len(delta) // heads // 2, 2, -1).swapaxes(1, 2).reshape(delta.shape)
        module = f"model.layers.{layer}.{names[which]}.weight"
        merged[module] = base[module] + delta
    return differences(merged, load_arrays(GOLDENS / "gguf" / "merged.safetensors"))


def in_onnxruntime(name):
    """Its own reader, and the loader that a session's run options take."""
    onnxruntime.LoraAdapter().Load(str(EXPORTED / name))
    # The values lie in memory of the adapter, which must outlive them.
    adapter = onnxruntime.AdapterFormat.read_adapter(str(EXPORTED / name))
    parameters = {key: value.numpy().copy() for key, value in adapter.get_parameters().items()}
    merged = {}
    for key, base in load_arrays(GOLDENS / "onnx-adapter" / "base.safetensors").items():
        module = key.removesuffix(".weight")
        if f"{module}.lora_A.weight" in parameters:
            merged[key] = base + (parameters[f"{module}.lora_A.weight"] @ parameters[f"{module}.lora_B.weight"]).T
    return differences(merged, load_arrays(GOLDENS / "onnx-adapter" / "merged.safetensors"))


# The UNets of make_format_goldens.py and make_diffusers_goldens.py; only their shapes matter.
CHECKS = {
    "diffusers.safetensors": lambda name: in_diffusers(name, unet(attention_head_dim=8, cross_attention_dim=24), "diffusers"),
    "sd2.safetensors": lambda name: in_diffusers(name, unet(attention_head_dim=(1, 2), cross_attention_dim=12, use_linear_projection=True), "diffusers-sd2"),
    "kohya.safetensors": in_kohya,
    "adapter.gguf": in_llama_cpp,
    "adapter.onnx_adapter": in_onnxruntime,
}
found = {}
for name, check in CHECKS.items():
    try:
        found[name] = check(name)
    except Exception as error:
        found[name] = f"{type(error).__name__}: {error}"
print(json.dumps(found))
