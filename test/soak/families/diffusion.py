"""Tiny pipelines of Stable Diffusion 1.5 and SDXL, LoRAs for all of their models, their exports to ONNX, and the latents that diffusers' own
pipelines make: what test/soak/families.js runs.

Tasks "a" and "b" change the attention of UNet and text encoders; "convolutions" those of the UNet too. Random weights from fixed seeds;
there is no VAE.

usage: python diffusion.py FOLDER
"""
import json, logging, pathlib, shutil, sys, warnings
import torch
from diffusers import (DDIMScheduler, EulerDiscreteScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel)
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
from transformers.integrations import peft as integration

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from make import described, lean, plain  # noqa: E402

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)
# transformers 5.24 asks for PEFT 0.22, but needs nothing of it here.
integration.check_peft_version = lambda **_: None
STEPS, GUIDANCE, SIZE, TOKENS = 4, 4.0, 8, 7
NOISE = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1,
         "timestep_spacing": "leading"}
CLIP = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
        "max_position_embeddings": TOKENS, "projection_dim": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ATTENTION = {"unet": ["to_q", "to_k", "to_v", "to_out.0"], "text": ["q_proj", "k_proj", "v_proj", "out_proj"]}
LORAS = {"a": {"r": 4, "unet": ATTENTION["unet"], "text": ATTENTION["text"]},
         "b": {"r": 2, "unet": ["to_q", "to_v", "ff.net.2", "time_emb_proj"], "text": ["q_proj", "fc1", "fc2"]},
         "convolutions": {"r": 2, "unet": ["to_q", "conv1", "conv2", "conv_shortcut"], "text": ["q_proj"]}}


def wide(model, seed):
    """Random weights with which every layer matters."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = 0.7 * noise / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else parameter.data + 0.05 * noise
    return model.eval()


def unet(**more):
    return wide(UNet2DConditionModel(sample_size=SIZE, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4, **more), 1)


def sd15():
    net = unet(down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
               cross_attention_dim=32, attention_head_dim=4)
    return StableDiffusionPipeline(
        vae=None, text_encoder=wide(CLIPTextModel(CLIPTextConfig(**CLIP)), 2), tokenizer=None, unet=net, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
        scheduler=DDIMScheduler(**NOISE, set_alpha_to_one=False, clip_sample=False))


def sdxl():
    net = unet(down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
               cross_attention_dim=64, attention_head_dim=(2, 4), transformer_layers_per_block=(1, 2), use_linear_projection=True,
               addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=80)
    return StableDiffusionXLPipeline(
        vae=None, text_encoder=wide(CLIPTextModel(CLIPTextConfig(**CLIP)), 2),
        text_encoder_2=wide(CLIPTextModelWithProjection(CLIPTextConfig(**CLIP)), 3), tokenizer=None, tokenizer_2=None, unet=net,
        scheduler=EulerDiscreteScheduler(**NOISE), add_watermarker=False)


PIPELINES = {"sd15": sd15, "sdxl": sdxl}


def build(kind):
    torch.manual_seed(0)
    pipe = PIPELINES[kind]()
    pipe.set_progress_bar_config(disable=True)
    return pipe


PARTS = {"sd15": ["unet", "text_encoder"], "sdxl": ["unet", "text_encoder", "text_encoder_2"]}


def in_checkpoint(component, name):
    """CLIP has a level in files of checkpoints that some versions of transformers leave out."""
    flat = component.startswith("text_encoder") and not name.startswith(("text_model.", "text_projection"))
    return f"{component}.text_model.{name}" if flat else f"{component}.{name}"


def save_lora(kind, task, folder):
    """A random LoRA, saved by diffusers."""
    pipe, layers = build(kind), {}
    for index, name in enumerate(PARTS[kind]):
        model, given = getattr(pipe, name), LORAS[task]
        model.add_adapter(LoraConfig(r=given["r"], lora_alpha=6, target_modules=given["unet" if name == "unet" else "text"]))
        generator = torch.Generator().manual_seed(10 * ord(task[0]) + index)
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5
        state = get_peft_model_state_dict(model)
        # The older names exist for attention alone, and of a file with both diffusers drops one kind without a word.
        layers[f"{name}_lora_layers"] = state if name == "unet" else convert_state_dict_to_diffusers(state)
    type(pipe).save_lora_weights(folder, **layers, **_collate_lora_metadata({name: getattr(pipe, name) for name in PARTS[kind]}))


def encoded(pipe, ids):
    """What the pipeline itself makes of token ids."""
    if not hasattr(pipe, "text_encoder_2"):
        return {"prompt_embeds": pipe.text_encoder(ids)[0]}
    outputs = [pipe.text_encoder(ids, output_hidden_states=True), pipe.text_encoder_2(ids, output_hidden_states=True)]
    return {"prompt_embeds": torch.cat([one.hidden_states[-2] for one in outputs], -1), "pooled_prompt_embeds": outputs[1][0]}


@torch.no_grad()
def latents(pipe, feeds):
    positive, negative = encoded(pipe, feeds["prompt"]), encoded(pipe, feeds["negative"])
    result = pipe(**positive, **{f"negative_{name}": value for name, value in negative.items()}, latents=feeds["noise"].clone(),
                  num_inference_steps=STEPS, guidance_scale=GUIDANCE, height=8 * SIZE, width=8 * SIZE, output_type="latent")
    return result.images


class Encoder(nn.Module):
    """The outputs that pipelines take; the module keeps its own names, as in Optimum's exports."""

    def __init__(self, encoder, layers):
        super().__init__()
        for name, child in encoder.named_children():
            self.add_module(name, child)
        self.__dict__.update(whole=encoder, layers=layers)

    def forward(self, input_ids):
        result = self.__dict__["whole"](input_ids, output_hidden_states=True)
        return (result.hidden_states[-2], result[0]) if self.__dict__["layers"] else result[0]


class Net(nn.Module):
    def __init__(self, net, added):
        super().__init__()
        for name, child in net.named_children():
            self.add_module(name, child)
        self.__dict__.update(whole=net, added=added)

    def forward(self, sample, timestep, encoder_hidden_states, *added):
        more = {"added_cond_kwargs": dict(zip(("text_embeds", "time_ids"), added))} if added else {}
        return self.__dict__["whole"](sample, timestep, encoder_hidden_states, **more, return_dict=False)[0]


@torch.no_grad()
def export(kind, folder):
    pipe, files = build(kind), {}
    rows = {0: "batch"}
    for name in PARTS[kind]:
        model, path = getattr(pipe, name), folder / f"{name}.onnx"
        if name == "unet":
            width = model.config.cross_attention_dim
            added = {"text_embeds": torch.randn(2, 32), "time_ids": torch.randn(2, 6)} if kind == "sdxl" else {}
            feeds = {"sample": torch.randn(2, 4, SIZE, SIZE), "timestep": torch.tensor([1]),
                     "encoder_hidden_states": torch.randn(2, TOKENS, width)} | added
            module, outputs = Net(model, bool(added)), ["out_sample"]
        else:
            feeds = {"input_ids": torch.ones(2, TOKENS, dtype=torch.int64)}
            module, outputs = Encoder(model, kind == "sdxl"), ["penultimate", "last"] if kind == "sdxl" else ["last"]
        torch.onnx.export(module.eval(), tuple(feeds.values()), path, dynamo=False, opset_version=17, input_names=list(feeds),
                          output_names=outputs, dynamic_axes={one: rows for one in [*feeds, *outputs] if one != "timestep"})
        lean(path)
        files[name] = path.name
    return files


def make(kind, root):
    folder = root / kind
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(5)
    draw = lambda: torch.randint(4, 96, (1, TOKENS), generator=generator)
    feeds = {"prompt": draw(), "negative": draw(), "noise": torch.randn(1, 4, SIZE, SIZE, generator=generator)}
    # The position of the end tells which token speaks for the whole.
    for name in ("prompt", "negative"):
        feeds[name][0, -1] = 2
    pipe = build(kind)
    save_file({in_checkpoint(name, key): value.contiguous().clone() for name in PARTS[kind]
               for key, value in getattr(pipe, name).state_dict().items()}, folder / "base.safetensors")
    answers = {"base": plain(latents(pipe, feeds))}
    for task in LORAS:
        save_lora(kind, task, folder / "adapters" / task)
        pipe.load_lora_weights(folder / "adapters" / task, adapter_name=task)
        pipe.set_adapters(task)
        answers[task] = plain(latents(pipe, feeds))
        pipe.delete_adapters(task)
        apart = max(abs(a - b) for a, b in zip(answers[task], answers["base"])) / max(map(abs, answers["base"]))
        assert apart > 0.02, f"{kind} {task} changes only {apart:.1e}"
    assert plain(latents(pipe, feeds)) == answers["base"], "the base has not come back"
    (folder / "pipeline.json").write_text(json.dumps(
        {"files": export(kind, folder), "feeds": described(feeds), "steps": STEPS, "guidance": GUIDANCE, "latents": answers}))


if __name__ == "__main__":
    for kind in PIPELINES:
        make(kind, pathlib.Path(sys.argv[1]))
        print(f"{kind}: made", flush=True)
