"""PEFT's own answer with an exported adapter, on the tiny BERT of data/sessions, or the tiny RoBERTa or DistilBERT of data/heads.

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
    from transformers import AutoConfig, AutoModelForSequenceClassification
except ImportError as missing:
    print(missing, file=sys.stderr)
    sys.exit(3)

warnings.filterwarnings("ignore")
base, adapter, feeds = sys.argv[1:]
weights = load_file(base)
shape = {
    "bert": dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, max_position_embeddings=16),
    "roberta": dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, max_position_embeddings=34, type_vocab_size=1, pad_token_id=1),
    "distilbert": dict(dim=32, n_layers=1, n_heads=4, hidden_dim=48, max_position_embeddings=32, pad_token_id=1),
}
kind = next(one for one in shape if any(name.startswith(f"{one}.") for name in weights))
last = "classifier.out_proj" if kind == "roberta" else "classifier"
labels = load_file(f"{adapter}/adapter_model.safetensors")[f"base_model.model.{last}.weight"].shape[0]
model = AutoModelForSequenceClassification.from_config(
    AutoConfig.for_model(kind, vocab_size=64, num_labels=labels, **shape[kind])).eval()
# Layers of a head in front of the last one come from the adapter too.
state = {k: v for k, v in weights.items() if "classifier" not in k}
model.load_state_dict(state, strict=False)
tuned = PeftModel.from_pretrained(model, adapter).eval()
inputs = {k: torch.tensor(v) for k, v in json.load(open(feeds)).items()}
with torch.no_grad():
    print(json.dumps(tuned(**inputs).logits.double().tolist()))
