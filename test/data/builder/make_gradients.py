"""Gradients of a language model's loss for the files that make.py has written, by PEFT in f64: gradients.safetensors.

The loss is the mean over all tokens of the cross entropy with the class (7 · row + 3) mod 48. For the 4-bit file the base is what its
bytes stand for.

usage: python make_gradients.py    (torch 2.13, transformers 5, peft 0.21, onnx)
"""
import pathlib
import onnx, torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

HERE = pathlib.Path(__file__).parent
# Its functions, without what it does.
source = (HERE / "make.py").read_text().split("\ngoldens, answers, saved =")[0]

made = {"__file__": str(HERE / "make.py")}
exec(source, made)

found = {}
for name, kind in [("llama", "llama"), ("llama-apart", "llama"), ("llama-int4", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3"), ("small-gates", "small"), ("phi3", "phi3")]:
    model = made["base"](kind)
    model.load_state_dict(load_file(HERE / f"{kind}.safetensors"))
    rounded = made["dequantised"](model, onnx.load(HERE / f"{name}.onnx")).state_dict() if name.endswith("int4") else None
    exact = PeftModel.from_pretrained(model, HERE / "adapters" / kind / "all").double().eval()
    if rounded:
        for key, value in exact.named_parameters():
            if "lora_" not in key:
                value.data.copy_(rounded[key.replace("base_model.model.", "").replace(".base_layer", "")])
    for key, value in exact.named_parameters():
        value.requires_grad_("lora_" in key)
    ids = torch.tensor(made["ROWS"])
    logits = exact(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, (7 * torch.arange(len(logits)) + 3) % 48)
    loss.backward()
    found[f"{name}/loss"] = loss.detach().float().reshape(1)
    for key, value in exact.named_parameters():
        if "lora_" in key:
            plain = key.replace("base_model.model.", "").replace(".default", "").replace(".weight", "")
            found[f"{name}/{plain}"] = value.grad.float().contiguous()
save_file(found, HERE / "gradients.safetensors")
print({key: float(value) for key, value in found.items() if key.endswith("/loss")}, sum(4 * value.numel() for value in found.values()), "bytes")
