"""PEFT's own judgement of exported adapters: loads each into its base, merges, compares with the golden merge.

usage: peft-oracle.py GOLDENS EXPORTED
EXPORTED holds one folder per case of GOLDENS. Prints one JSON object: case -> largest difference over the largest |W| of
its tensor, or what went wrong. Exits with 3 when torch, transformers, peft or safetensors cannot be imported.
Models are those of data/make/make_peft_goldens.py; only their shapes matter, since the adapted weights come from the
golden base.
"""
import json, os, pathlib, sys, warnings

os.environ["HF_HUB_OFFLINE"] = "1"
try:
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
except ImportError as missing:
    print(missing, file=sys.stderr)
    sys.exit(3)


def bert():
    return BertForSequenceClassification(BertConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=80, vocab_size=96, max_position_embeddings=32, num_labels=3))


def gpt2():
    return GPT2LMHeadModel(GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=96, n_positions=32))


def llama():
    return LlamaForCausalLM(LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96, vocab_size=96, max_position_embeddings=32, tie_word_embeddings=False))


class Convs(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.down = torch.nn.Conv2d(6, 10, 3, padding=1)
        self.mix = torch.nn.Conv2d(10, 12, 1)
        self.seq = torch.nn.Conv1d(12, 8, 5)
        self.head = torch.nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.seq(self.mix(self.down(x)).flatten(2)).mean(-1))


MODELS = {"all-linear": llama, "layers": llama, "fan-in-fan-out": gpt2, "dora-fan-in-fan-out": gpt2, "conv": Convs, "conv-dora": Convs}


def difference(golden, exported):
    model = MODELS.get(golden.name, bert)().eval()
    model.load_state_dict(load_file(golden / "base.safetensors"), strict=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(model, exported)
    said = [str(w.message) for w in caught if "missing" in str(w.message).lower() or "mismatch" in str(w.message).lower()]
    if said:
        return said[0]
    merged = model.merge_and_unload().state_dict()
    worst = 0.0
    for name, expected in load_file(golden / "merged.safetensors").items():
        found = merged[name].double()
        worst = max(worst, ((found - expected.double()).abs().max() / expected.double().abs().max()).item())
    return worst


goldens, exported = map(pathlib.Path, sys.argv[1:])
result = {}
for folder in sorted(exported.iterdir()):
    try:
        result[folder.name] = difference(goldens / folder.name, folder)
    except Exception as error:
        result[folder.name] = f"{type(error).__name__}: {error}"
print(json.dumps(result))
