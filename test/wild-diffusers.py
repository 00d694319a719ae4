"""diffusers' own loading of LoRAs into a UNet of Stable Diffusion's real widths, with random weights.

usage: wild-diffusers.py FOLDER BASE VERSION     (VERSION: sd15 or sd2)
Writes the attention weights of the UNet to BASE (safetensors), and says "ready". Then, for each line "ID FILE" of the input, loads
FOLDER/ID with diffusers, merges it as PEFT does, compares with the weights in FILE, and prints the largest difference over the
largest |W|. Exits with 3 when a package cannot be imported.
"""

import pathlib
import sys
import warnings

warnings.filterwarnings("ignore")
try:
    import torch
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from safetensors.torch import load_file, save_file
except ImportError as missing:
    print(missing, file=sys.stderr)
    sys.exit(3)

FOLDER, BASE, VERSION = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
SHAPES = {
    "sd15": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "sd2": {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
}
torch.manual_seed(1)
unet = UNet2DConditionModel(sample_size=64, **SHAPES[VERSION])


def attention():
    state = {name.replace(".base_layer", ""): value for name, value in unet.state_dict().items() if ".lora_" not in name}
    return {name: value for name, value in state.items() if ".attn" in name and name.endswith(".weight")}


save_file({name: value.contiguous() for name, value in attention().items()}, BASE)
print("ready", flush=True)
for line in sys.stdin:
    task, file = line.rstrip("\n").split(" ", 1)
    state, alphas, metadata = StableDiffusionPipeline.lora_state_dict(str(FOLDER / task), return_lora_metadata=True)
    if not any(name.startswith("unet.") for name in state):
        # save_attn_procs wrote files of the UNet without a prefix.
        state = {f"unet.{name}": value for name, value in state.items()}
    StableDiffusionPipeline.load_lora_into_unet(state, network_alphas=alphas, unet=unet, metadata=metadata, adapter_name="one")
    layers = [module for module in unet.modules() if isinstance(module, BaseTunerLayer)]
    before = {id(layer): layer.base_layer.weight.data.clone() for layer in layers}
    for layer in layers:
        layer.merge(safe_merge=True)
    found, merged = load_file(file), attention()
    assert set(found) == set(merged), sorted(set(found) ^ set(merged))[:4]
    print(max(float((merged[name] - value).abs().max() / merged[name].abs().max()) for name, value in found.items()), flush=True)
    for layer in layers:
        layer.base_layer.weight.data = before[id(layer)]
        layer.merged_adapters.clear()
    unet.delete_adapters("one")
