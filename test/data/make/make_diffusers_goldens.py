"""Golden pairs for what the files of make_format_goldens.py leave out: alphas of modules, several models of a pipeline (diffusers:
components), ranks that differ, half precision, DoRA, LoRA biases, names without the model in front.

usage: make_diffusers_goldens.py OUT_DIR      (OUT_DIR/kohya is there, made by make_format_goldens.py)

Each adapter.safetensors is written, or renamed, by diffusers' own functions from a random LoRA. merged.safetensors is what diffusers'
loaders and PEFT's merge make of that very file (f32), but for diffusers-alphas, whose merge is by definition, as kohya's.
Parameters are named as in the files of checkpoints, with the model's name in front.
"""

import json
import pathlib
import shutil
import sys

import torch
from diffusers import SD3Transformer2DModel, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders.lora_base import _load_lora_into_text_encoder
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

OUT = pathlib.Path(sys.argv[1])
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
CLIP = ["q_proj", "k_proj", "v_proj", "out_proj"]


def unet():
    torch.manual_seed(3)
    return UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(16,), norm_num_groups=8, cross_attention_dim=12,
        attention_head_dim=8, down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
    )


def text_encoder(kind=CLIPTextModel, seed=4):
    torch.manual_seed(seed)
    return kind(CLIPTextConfig(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, projection_dim=8,
        max_position_embeddings=8,
    ))


def transformer():
    torch.manual_seed(6)
    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, num_layers=1, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=12,
        caption_projection_dim=16, pooled_projection_dim=8, pos_embed_max_size=8, qk_norm=None,
    )


MAKE = {
    "unet": unet,
    "text_encoder": text_encoder,
    "text_encoder_2": lambda: text_encoder(CLIPTextModelWithProjection, 5),
    "transformer": transformer,
}


def trained(component, **config):
    """A model with a random LoRA, as training would leave it."""
    model = MAKE[component]()
    model.add_adapter(LoraConfig(**config))
    generator = torch.Generator().manual_seed(len(component))
    for name, parameter in model.named_parameters():
        if "lora_magnitude" in name:
            parameter.data *= 0.5 + torch.rand(parameter.shape, generator=generator)
        elif "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return model


def in_checkpoint(component, name):
    """A name of a component's parameter as in checkpoints, where CLIP has a level that some versions of transformers leave out."""
    flat = component.startswith("text_encoder") and not name.startswith(("text_model.", "text_projection"))
    return f"{component}.text_model.{name}" if flat else f"{component}.{name}"


def weights(component, model):
    state = {name.replace(".base_layer", ""): value for name, value in model.state_dict().items() if ".lora_" not in name}
    return {in_checkpoint(component, name): value.clone().contiguous() for name, value in state.items()}


def merge(model):
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)


def write(name, note, components, load):
    """Base and merge, of what differs. `load` puts the folder's file into fresh models."""
    folder = OUT / name
    fresh = {component: MAKE[component]() for component in components}
    base = {key: value for component, model in fresh.items() for key, value in weights(component, model).items()}
    load(folder, fresh)
    for model in fresh.values():
        merge(model)
    merged = {key: value for component, model in fresh.items() for key, value in weights(component, model).items()}
    finish(folder, note, base, merged)


def finish(folder, note, base, merged):
    changed = sorted(key for key in merged if key not in base or not torch.equal(base[key], merged[key]))
    save_file({key: base[key] for key in changed if key in base}, folder / "base.safetensors")
    save_file({key: merged[key] for key in changed}, folder / "merged.safetensors")
    case = {"case": folder.name, "note": note, "expect": "load", "changed": changed}
    (folder / "case.json").write_text(json.dumps(case, indent=1) + "\n")
    state = load_file(folder / "adapter.safetensors")
    print(folder.name, len(state), "tensors,", len(changed), "changed; first", sorted(state)[:2])


def new(name):
    folder = OUT / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def load_pipeline(folder, models):
    pipeline = StableDiffusionXLPipeline if "text_encoder_2" in models else StableDiffusionPipeline
    state, alphas, metadata = pipeline.lora_state_dict(
        str(folder), weight_name="adapter.safetensors", unet_config=unet().config, return_lora_metadata=True
    )
    for component, model in models.items():
        if component == "unet":
            pipeline.load_lora_into_unet(state, network_alphas=alphas, unet=model, metadata=metadata)
        else:
            _load_lora_into_text_encoder(state, alphas, model, prefix=component, metadata=metadata)


# Alphas of modules: kohya's file under the names that diffusers gives it, and its `network_alphas` as tensors.
folder = new("diffusers-alphas")
state, alphas = StableDiffusionPipeline.lora_state_dict(str(OUT / "kohya"), weight_name="adapter.safetensors")
save_file({**state, **{name: torch.tensor(alpha) for name, alpha in alphas.items()}}, folder / "adapter.safetensors")
finish(
    folder,
    "kohya's file as diffusers names it, its alphas beside; merged by definition",
    *({f"unet.{k}": v for k, v in load_file(OUT / "kohya" / f"{which}.safetensors").items()} for which in ("base", "merged")),
)

# All models of a pipeline, as the training scripts save them.
folder = new("diffusers-pipeline")
one = trained("unet", r=4, lora_alpha=6, target_modules=ATTENTION, rank_pattern={"attn1.to_q": 2}, alpha_pattern={
    "^down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v": 1})
two = trained("text_encoder", r=3, lora_alpha=5, target_modules=CLIP, use_rslora=True)
three = trained("text_encoder_2", r=2, lora_alpha=2, target_modules=[*CLIP, "fc1", "text_projection"])
StableDiffusionXLPipeline.save_lora_weights(
    folder,
    unet_lora_layers=get_peft_model_state_dict(one),
    text_encoder_lora_layers=get_peft_model_state_dict(two),
    text_encoder_2_lora_layers=get_peft_model_state_dict(three),
    weight_name="adapter.safetensors",
    **_collate_lora_metadata({"unet": one, "text_encoder": two, "text_encoder_2": three}),
)
write(folder.name, "three models with metadata: rsLoRA, patterns of rank and alpha", ["unet", "text_encoder", "text_encoder_2"],
      load_pipeline)

# The middle generation, in half precision, with two ranks and no word about alpha.
folder = new("diffusers-middle")
one = trained("unet", r=4, lora_alpha=4, target_modules=ATTENTION, rank_pattern={"to_k": 2}, alpha_pattern={"to_k": 2})
two = trained("text_encoder", r=3, lora_alpha=3, target_modules=CLIP)
state = {f"unet.{key}": value.half() for key, value in convert_state_dict_to_diffusers(get_peft_model_state_dict(one)).items()}
layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(two))
state |= {in_checkpoint("text_encoder", key): value.bfloat16() for key, value in layers.items()}
save_file({key: value.contiguous() for key, value in state.items()}, folder / "adapter.safetensors")
write(folder.name, "lora.down and lora_linear_layer.down, F16 and BF16, ranks 4 and 2 without alpha", ["unet", "text_encoder"],
      load_pipeline)

# The text encoder of 2023, whose modules had the names of a UNet's.
folder = new("diffusers-old-text")
two = trained("text_encoder", r=3, lora_alpha=3, target_modules=CLIP)
state = {}
for key, value in get_peft_model_state_dict(two).items():
    module, side = key.rsplit(".lora_", 1)
    attention, projection = module.rsplit(".", 1)
    name = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}[projection]
    side = "down" if side.startswith("A") else "up"
    state[in_checkpoint("text_encoder", f"{attention}.{name}_lora.{side}.weight")] = value.contiguous()
save_file(state, folder / "adapter.safetensors")
write(folder.name, "a text encoder under the names of 2023", ["text_encoder"], load_pipeline)

# DoRA, on convolutions too.
folder = new("diffusers-dora")
one = trained("unet", r=2, lora_alpha=3, use_dora=True, target_modules=["to_q", "to_out.0", "conv1", "proj_in"])
StableDiffusionPipeline.save_lora_weights(
    folder, unet_lora_layers=get_peft_model_state_dict(one), weight_name="adapter.safetensors", **_collate_lora_metadata({"unet": one})
)
write(folder.name, "DoRA of linear layers and convolutions", ["unet"], load_pipeline)

# One model's own `save_lora_adapter`: nothing in front of names or metadata.
folder = new("diffusers-bare")
one = trained("transformer", r=2, lora_alpha=3, lora_bias=True, target_modules=[*ATTENTION, "add_q_proj", "linear"])
one.save_lora_adapter(folder, adapter_name="default", weight_name="adapter.safetensors")
write(folder.name, "names without the model in front; LoRA biases", ["transformer"],
      lambda folder, models: models["transformer"].load_lora_adapter(str(folder), prefix=None, weight_name="adapter.safetensors"))
