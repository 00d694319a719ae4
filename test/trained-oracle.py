"""PEFT's own answer with an exported adapter, on the tiny BERT of data/sessions.

usage: trained-oracle.py BASE.safetensors ADAPTER FEEDS.json
FEEDS.json: {"input_ids": [[…]], …}. Prints the logits as JSON. Exits with 3 when torch, transformers, peft or safetensors
cannot be imported.
"""
import json, os, sys, warnings

os.environ["HF_HUB_OFFLINE"] = "1"
try:
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import BertConfig, BertForSequenceClassification
except ImportError as missing:
    print(missing, file=sys.stderr)
    sys.exit(3)

warnings.filterwarnings("ignore")
base, adapter, feeds = sys.argv[1:]
labels = load_file(f"{adapter}/adapter_model.safetensors")["base_model.model.classifier.weight"].shape[0]
model = BertForSequenceClassification(BertConfig(
    vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
    max_position_embeddings=16, num_labels=labels)).eval()
state = {k: v for k, v in load_file(base).items() if not k.startswith("classifier")}
model.load_state_dict(state, strict=False)
tuned = PeftModel.from_pretrained(model, adapter).eval()
inputs = {k: torch.tensor(v) for k, v in json.load(open(feeds)).items()}
with torch.no_grad():
    print(json.dumps(tuned(**inputs).logits.double().tolist()))
