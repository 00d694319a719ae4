"""Gradients of the loss of the adapter "answers", by PEFT in f64: gradients.safetensors.

The decoder reads the tokens that goldens.json says of it, one row padded in the encoder. The loss is the mean over all tokens of the
cross entropy with the class (7 · row + 3) mod 97. Encoder and decoder are one model here.

usage: python make_gradients.py    (torch 2.13, transformers 5, peft 0.21)
"""
import json, pathlib
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5ForConditionalGeneration

HERE = pathlib.Path(__file__).parent
torch.set_num_threads(1)

config = T5Config.from_pretrained(HERE)
config._attn_implementation = "eager"
model = T5ForConditionalGeneration(config)
missing, unexpected = model.load_state_dict(load_file(HERE / "base.safetensors"), strict=False)
assert not unexpected and all("embed_tokens" in name for name in missing), (missing, unexpected)
model.tie_weights()
exact = PeftModel.from_pretrained(model, HERE / "adapters/answers").double().eval()
for name, value in exact.named_parameters():
    value.requires_grad_("lora_" in name)

goldens = json.loads((HERE / "goldens.json").read_text())
ids = torch.tensor(goldens["rows"])
tokens = torch.tensor(goldens["answers"]["tokens"])[:, :8]
logits = exact(input_ids=ids, attention_mask=(ids != 0).long(), decoder_input_ids=tokens, use_cache=False).logits
expected = torch.tensor(goldens["answers"]["logits"]).reshape(logits.shape)
assert (logits - expected).abs().max() < 1e-6, "the model is not that of goldens.json"
logits = logits.flatten(0, 1)
loss = torch.nn.functional.cross_entropy(logits, (7 * torch.arange(len(logits)) + 3) % 97)
loss.backward()

found = {"loss": loss.detach().float().reshape(1)}
for name, value in exact.named_parameters():
    if "lora_" in name:
        plain = name.replace("base_model.model.", "").replace(".default", "").replace(".weight", "")
        found[plain] = value.grad.float().contiguous()
save_file(found, HERE / "gradients.safetensors")
print(float(loss), len(found) - 1, "gradients,", sum(4 * value.numel() for value in found.values()), "bytes")
