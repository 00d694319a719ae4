"""LoRAs of PEFT whose factors lie in the components of a pack: coefficients alone are trained.

A = alpha_A · E_A + M_A and Bᵀ = alpha_B · E_B + M_B, where E are the components and M the mean that the pack stores. PEFT sees an
ordinary LoRA: trainers, checkpoints and `save_pretrained` work as they are, and `eigenlora add` loses nothing of it.
"""
import json

import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from torch.nn.utils import parametrize


class Side(torch.nn.Module):
    """Coefficients [r, K] → a factor as PEFT holds it: A [r, in], B [out, r]. `transposed` is for B."""

    def __init__(self, E, mean, weight, transposed, stored):
        super().__init__()
        self.shape, self.transposed, self.stored = weight.shape, transposed, stored
        self.register_buffer("E", E.flatten(1).to(weight), persistent=False)
        self.register_buffer("mean", mean.flatten().to(weight), persistent=False)

    def forward(self, alpha):
        rows = (alpha @ self.E + self.mean).reshape(self.shape[self.transposed], -1)
        return (rows.T if self.transposed else rows).reshape(self.shape)

    def right_inverse(self, weight):
        """The nearest coefficients: PEFT's own start, or a checkpoint."""
        rows = weight.flatten(1).T if self.transposed else weight.flatten(1)
        return (rows.reshape(-1, self.E.shape[1]) - self.mean) @ torch.linalg.pinv(self.E)

    def rounded(self, alpha):
        """The factor of coefficients in the pack's number format: what is saved is what the pack will hold."""
        return self(alpha.to(self.stored).to(alpha.dtype)).contiguous()


def write(linear, state, prefix, _):
    """Puts the whole factor in the place of coefficients."""
    for name in [name for name in state if name.startswith(f"{prefix}parametrizations.")]:
        del state[name]
    held = linear.parametrizations.weight
    state[f"{prefix}weight"] = held[0].rounded(held.original.detach())


def read(linear, state, prefix, *_):
    """Finds the coefficients of a whole factor."""
    if (weight := state.pop(f"{prefix}weight", None)) is not None:
        side = linear.parametrizations.weight[0]
        state[f"{prefix}parametrizations.weight.original"] = side.right_inverse(weight.to(side.E))


def inside(model, file, task_type, rank=8):
    """A PEFT model with rows of coefficients on every module that the pack adapts. Sides without components stay those of a LoRA.

    file: what `eigenlora export PACK --components` wrote. Raises ValueError where the model is not the pack's.
    """
    with safe_open(file, "pt") as opened:
        about, tensors = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}
    if "eigenlora.components" not in (about or {}):
        raise ValueError(f"{file}: expected what `eigenlora export PACK --components` writes")
    names = json.loads(about["modules"])
    layers = dict(model.named_modules())
    for name in names:
        if name not in layers:
            raise ValueError(f"{file}: the model has no module {name}; the pack is of {about.get('base_model')}: load that")
    rank = next((E.shape[1] for E in tensors.values() if E.ndim == 3), min(rank, int(about.get("rank", rank))))
    tuned = get_peft_model(model, LoraConfig(task_type=task_type, r=rank, lora_alpha=rank, target_modules=names))
    for name in names:
        for side in "AB":
            E = tensors.get(f"{name}.{side}.components")
            if E is None:
                continue
            linear = getattr(tuned.base_model.model.get_submodule(name), f"lora_{side}")["default"]
            width = linear.weight.numel() // rank
            if E.shape[-1] != width:
                raise ValueError(f"{file}: {name}.{side} is {E.shape[-1]} wide, expected {width}: load the pack's base")
            mean = tensors.get(f"{name}.{side}.mean", torch.zeros(E.shape[1:]))
            stored = {"f16": torch.float16, "bf16": torch.bfloat16}.get(about["coefficients"], torch.float32)
            parametrize.register_parametrization(linear, "weight", Side(E, mean, linear.weight, side == "B", stored))
            linear.register_state_dict_post_hook(write)
            linear.register_load_state_dict_pre_hook(read)
    return tuned


def groups(model, rate):
    """Parameters for AdamW: factors of sides without components learn at a tenth of the rate."""
    whole, others = [], []
    for name, value in model.named_parameters():
        if value.requires_grad:
            (whole if name.endswith(("lora_A.default.weight", "lora_B.default.weight")) else others).append(value)
    return [{"params": others, "lr": rate}, *([{"params": whole, "lr": rate / 10}] if whole else [])]
