"""Golden pairs for LoRA files that the other scripts leave out: LyCORIS (convolutions, Tucker, DoRA scales) under kohya's names, MLX LM,
a UNet of Stable Diffusion 2, and the names of SDXL's original code.

usage: make_lora_goldens.py OUT_DIR

Each adapter is written by the tool that defines its format, from a random LoRA; merged.safetensors is what that tool merges (f32).
lycoris-lora 4, mlx-lm with mlx for the CPU, diffusers 0.42.
"""

import json
import pathlib
import re
import shutil
import sys

import mlx.core as mx
import mlx.nn
import numpy as np
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.lora_conversion_utils import (
    _convert_non_diffusers_lora_to_diffusers,
    _maybe_map_sgm_blocks_to_diffusers,
)
from lycoris.modules.locon import LoConModule
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import save_file

OUT = pathlib.Path(sys.argv[1])
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


def new(name):
    folder = OUT / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def finish(folder, note, base, merged, expect="load"):
    save_file({key: value.detach().contiguous() for key, value in base.items()}, folder / "base.safetensors")
    save_file({key: value.detach().contiguous() for key, value in merged.items()}, folder / "merged.safetensors")
    case = {"case": folder.name, "note": note, "expect": expect, "changed": sorted(merged)}
    (folder / "case.json").write_text(json.dumps(case, indent=1) + "\n")
    print(folder.name, sorted(merged))


# LyCORIS. Layers are called as those of Stable Diffusion are.
LAYERS = {
    "unet.down_blocks.0.resnets.1.conv1": lambda: torch.nn.Conv2d(6, 8, 3, padding=1),
    "unet.mid_block.attentions.0.proj_in": lambda: torch.nn.Conv2d(8, 8, 1),
    "unet.up_blocks.1.attentions.2.transformer_blocks.0.ff.net.0.proj": lambda: torch.nn.Linear(8, 12),
    "text_encoder.text_model.encoder.layers.3.self_attn.q_proj": lambda: torch.nn.Linear(6, 10),
}


def flat(name):
    model, module = name.split(".", 1)
    return {"unet": "lora_unet_", "text_encoder": "lora_te_"}[model] + module.replace(".", "_")


def lycoris(name, note, alphas=(1, 2, 3, 4), expect="load", **options):
    torch.manual_seed(11)
    state, base, merged = {}, {}, {}
    for (layer, make), alpha in zip(LAYERS.items(), alphas):
        original = make()
        module = LoConModule(flat(layer), original, lora_dim=3, alpha=alpha, **options)
        for parameter in (module.lora_up, module.lora_down, getattr(module, "lora_mid", None)):
            if parameter is not None:
                torch.nn.init.normal_(parameter.weight, std=0.3)
        if options.get("weight_decompose"):
            module.dora_scale.data *= 0.5 + torch.rand_like(module.dora_scale)
        state |= {f"{flat(layer)}.{key}": value.detach().clone().contiguous() for key, value in module.custom_state_dict().items()}
        base[f"{layer}.weight"] = original.weight.clone()
        merged[f"{layer}.weight"] = module.get_merged_weight()[0].reshape(original.weight.shape)
    folder = new(name)
    save_file(state, folder / "adapter.safetensors", metadata={"ss_network_module": "lycoris.kohya"})
    finish(folder, note, base, merged, expect)


lycoris("locon", "LoCon of LyCORIS: linear layers and convolutions, an alpha each")
lycoris("locon-tucker", "a Tucker factor between down and up of the 3x3 convolution", use_tucker=True)
lycoris("locon-dora", "dora_scale, norms over outputs", weight_decompose=True, wd_on_out=True)
lycoris("locon-dora-inputs", "dora_scale, norms over inputs: cannot be held", expect="refuse", weight_decompose=True, wd_on_out=False)


# MLX LM.
def torch_of(array):
    return torch.from_numpy(np.array(array.astype(mx.float32)))


def mlx_case(name, note, dora):
    mx.random.seed(12)
    folder = new(name)
    layers = {f"model.layers.0.self_attn.{which}_proj": mlx.nn.Linear(8, out, bias=False) for which, out in (("q", 12), ("v", 6))}
    if not dora:
        layers["model.embed_tokens"] = mlx.nn.Embedding(20, 8)
    state, base, merged = {}, {}, {}
    for layer, original in layers.items():
        kind = DoRALinear if dora else LoRAEmbedding if isinstance(original, mlx.nn.Embedding) else LoRALinear
        module = kind.from_base(original, r=3, scale=2.5)
        module.lora_b = 0.3 * mx.random.normal(module.lora_b.shape)
        if dora:
            module.m = module.m * (0.5 + mx.random.uniform(shape=module.m.shape))
        for key in ("lora_a", "lora_b", "m"):
            if key in module:
                state[f"{layer}.{key}"] = np.array(module[key])
        base[f"{layer}.weight"] = torch_of(original.weight)
        merged[f"{layer}.weight"] = torch_of(module.fuse().weight)
    save_arrays(state, folder / "adapters.safetensors")
    config = {
        "fine_tune_type": "dora" if dora else "lora", "num_layers": 1, "model": "someone/tiny",
        "lora_parameters": {"rank": 3, "dropout": 0.0, "scale": 2.5},
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")
    finish(folder, note, base, merged)


mlx_case("mlx", "MLX LM: linear layers and an embedding", dora=False)
mlx_case("mlx-dora", "MLX LM: DoRA", dora=True)


# Stable Diffusion 2: linear projections around attention, heads that differ by block.
def unet2():
    torch.manual_seed(13)
    return UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=8, cross_attention_dim=12,
        attention_head_dim=(1, 2), use_linear_projection=True,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


folder = new("diffusers-sd2")
model = unet2()
model.add_adapter(LoraConfig(r=2, lora_alpha=3, target_modules=[*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj"]))
for name, parameter in model.named_parameters():
    if "lora_" in name:
        torch.nn.init.normal_(parameter, std=0.2)
state = {f"unet.{key}": value.contiguous() for key, value in get_peft_model_state_dict(model).items()}
state |= {key.replace(".lora_A.weight", ".alpha"): torch.tensor(3.0) for key in state if key.endswith(".lora_A.weight")}
save_file(state, folder / "adapter.safetensors")
base = unet2()
base_state = {f"unet.{key}": value.clone() for key, value in base.state_dict().items()}
for module in model.modules():
    if isinstance(module, BaseTunerLayer):
        module.merge(safe_merge=True)
after = {f"unet.{key.replace('.base_layer', '')}": value for key, value in model.state_dict().items() if ".lora_" not in key}
changed = [key for key in after if not torch.equal(after[key], base_state[key])]
finish(folder, "a UNet as Stable Diffusion 2 has it", {key: base_state[key] for key in changed}, {key: after[key] for key in changed})


# Names of SDXL's original code: which modules diffusers takes them for.
class Config:
    layers_per_block = 2


ATTENTION_LAYER = [f"attn{i}_{name}" for i in (1, 2) for name in ("to_q", "to_k", "to_v", "to_out_0")] + ["ff_net_0_proj", "ff_net_2"]
RESNET = ["in_layers_2", "emb_layers_1", "out_layers_3", "skip_connection"]
names = []
for where, resnets, attentions in (
    ("input_blocks", (1, 2, 4, 5, 7, 8), {4: 2, 5: 2, 7: 10, 8: 10}),
    ("output_blocks", range(9), {0: 10, 1: 10, 2: 10, 3: 2, 4: 2, 5: 2}),
):
    for i in resnets:
        names += [f"{where}_{i}_0_{part}" for part in RESNET]
    for i, depth in attentions.items():
        names += [f"{where}_{i}_1_{part}" for part in ("proj_in", "proj_out")]
        names += [f"{where}_{i}_1_transformer_blocks_{d}_{part}" for d in range(depth) for part in ATTENTION_LAYER]
names += [f"middle_block_{i}_{part}" for i in (0, 2) for part in RESNET]
names += [f"middle_block_1_{part}" for part in ("proj_in", "proj_out")]
names += [f"middle_block_1_transformer_blocks_{d}_{part}" for d in range(10) for part in ATTENTION_LAYER]
names += ["input_blocks_3_0_op", "input_blocks_6_0_op", "output_blocks_2_2_conv", "output_blocks_5_2_conv"]
state = {}
for i, name in enumerate(names):
    for side in ("down", "up"):
        state[f"lora_unet_{name}.lora_{side}.weight"] = torch.full((1, 1), float(i))
state = _maybe_map_sgm_blocks_to_diffusers(state, Config())
state, _ = _convert_non_diffusers_lora_to_diffusers(state)
found = {}
for key, value in state.items():
    module = re.sub(r"(\.processor)?[._]lora[._].*|_lora\.(down|up)\.weight$", "", key)
    found[names[int(value[0, 0])]] = re.sub(r"\.to_out$", ".to_out.0", module.replace(".processor", ""))
assert len(found) == len(names), (len(found), len(names))
(OUT / "sdxl-names.json").write_text(json.dumps(dict(sorted(found.items())), indent=0) + "\n")
print(len(found), "names")
