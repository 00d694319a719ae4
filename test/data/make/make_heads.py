"""Heads of two layers: tiny RoBERTa and DistilBERT with 3 labels, and PEFT adapters of 2 and 4 labels, whose heads PEFT saves whole.
usage: make_heads.py OUT_DIR      one folder per model: model.onnx, base.safetensors, adapters/{two,four}/, goldens.json with PEFT's logits (f64)"""
import json, pathlib, shutil, sys, torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import DistilBertConfig, DistilBertForSequenceClassification, RobertaConfig, RobertaForSequenceClassification
OUT = pathlib.Path(sys.argv[1])
ROBERTA = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, vocab_size=64, max_position_embeddings=34, type_vocab_size=1, initializer_range=0.15, pad_token_id=1)
DISTILBERT = dict(dim=32, n_layers=1, n_heads=4, hidden_dim=48, vocab_size=64, max_position_embeddings=32, initializer_range=0.15, pad_token_id=1)
MODELS = {"roberta": (RobertaForSequenceClassification, RobertaConfig, ROBERTA, ["query", "value"]),
          "distilbert": (DistilBertForSequenceClassification, DistilBertConfig, DISTILBERT, ["q_lin", "v_lin"])}
class Logits(torch.nn.Module):
    def __init__(self, m): super().__init__(); self.inner = m
    def forward(self, ids, mask): return self.inner(input_ids=ids, attention_mask=mask).logits
for name, (Model, Config, shape, targets) in MODELS.items():
    out = OUT / name; shutil.rmtree(out, ignore_errors=True); out.mkdir(parents=True)
    torch.manual_seed(5); base = Model(Config(num_labels=3, attn_implementation="sdpa", **shape)).eval()
    for n, q in base.named_parameters():
        if "classifier" in n: q.data.normal_(0, 0.2)
    ids = torch.randint(3, 64, (3, 7)); mask = torch.ones_like(ids); mask[1, 5:] = 0; ids[1, 5:] = 1
    dims = {0: "batch_size", 1: "sequence_length"}
    base.config.return_dict = False
    torch.onnx.export(base, (ids, mask), out / "model.onnx", input_names=["input_ids", "attention_mask"], output_names=["logits"], dynamic_axes={"input_ids": dims, "attention_mask": dims, "logits": {0: "batch_size"}}, opset_version=17, dynamo=False)
    import onnx; g = onnx.load(out / "model.onnx")
    for node in g.graph.node: node.doc_string = ""
    base.config.return_dict = True
    onnx.save(g, out / "model.onnx")
    save_file({k: v.contiguous() for k, v in base.state_dict().items() if v.is_floating_point()}, out / "base.safetensors")
    logits = {"base": Logits(base.double())(ids, mask).tolist()}
    for adapter, labels in (("two", 2), ("four", 4)):
        torch.manual_seed(labels); m = Model(Config(num_labels=labels, attn_implementation="sdpa", **shape)).eval()
        encoder = {k: v.float() for k, v in base.state_dict().items() if "classifier" not in k}
        print(name, adapter, m.load_state_dict(encoder, strict=False).missing_keys)
        p = get_peft_model(m, LoraConfig(task_type="SEQ_CLS", r=2, lora_alpha=4, target_modules=targets)).eval()
        for n, q in p.named_parameters():
            if "lora_" in n: q.data.normal_(0, 0.6)
            if "modules_to_save" in n: q.data.normal_(0, 0.3)
        p.save_pretrained(out / "adapters" / adapter); (out / "adapters" / adapter / "README.md").unlink(missing_ok=True)
        path = out / "adapters" / adapter / "adapter_config.json"; c = json.loads(path.read_text()); c["base_model_name_or_path"] = f"tiny-random-{name}"; c["target_modules"] = sorted(c["target_modules"])
        path.write_text(json.dumps(c, indent=1, sort_keys=True))
        logits[adapter] = Logits(p.double())(ids, mask).tolist()
    (out / "goldens.json").write_text(json.dumps({"feeds": {"input_ids": ids.tolist(), "attention_mask": mask.tolist()}, "logits": logits}))
