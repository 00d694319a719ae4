"""Training steps in PyTorch, one thread: the same coefficients over the same components, and PEFT's LoRA.
usage: step.py CONFIG.json BASE.safetensors TASK.safetensors RATE
BASE: every weight of BertForSequenceClassification. TASK: per module E_A [K, in], M_A [in], alpha_A [r, K] and the same of B, and the head.
Prints {"version"}, then answers one line for each line of its input: {"way": "coefficients" | "lora" | "forward", "batches": [{"ids", "mask", "labels"}]} → {"ms", "cpu", "losses"}; {"way": "begin"} → {}, from the start again.
No dropout, AdamW without decay, gradients clipped to a norm of 1: as eigenlora/train."""
import json, sys, time, torch, peft
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification
torch.set_num_threads(1)
config = json.load(open(sys.argv[1])); base, task, rate = load_file(sys.argv[2]), load_file(sys.argv[3]), float(sys.argv[4])
labels = task["head.bias"].shape[0]; config |= {"num_labels": labels, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
class Shared(torch.nn.Module):
    def __init__(self, linear, name):
        super().__init__(); self.linear = linear
        for side in "AB":
            for part in "EM": self.register_buffer(f"{part}_{side}", task[f"{name}.{part}_{side}"])
            setattr(self, f"alpha_{side}", torch.nn.Parameter(task[f"{name}.alpha_{side}"].clone()))
    def forward(self, x):
        return self.linear(x) + (x @ (self.alpha_A @ self.E_A + self.M_A).T) @ (self.alpha_B @ self.E_B + self.M_B)
def make():
    model = BertForSequenceClassification(BertConfig(**config)); state = {**base, "classifier.weight": task["head.weight"], "classifier.bias": task["head.bias"]}
    missing, unexpected = model.load_state_dict(state, strict=False); assert not unexpected and all("position_ids" in m for m in missing), (missing, unexpected)
    return model.train()
def coefficients():
    model = make().requires_grad_(False)
    for name in sorted({k[:-len(".alpha_A")] for k in task if k.endswith(".alpha_A")}):
        parent, last = name.rsplit(".", 1); parent = model.get_submodule(parent); setattr(parent, last, Shared(getattr(parent, last), name))
    model.classifier.requires_grad_(True); return model
def lora():
    return peft.get_peft_model(make(), peft.LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, lora_dropout=0.0, target_modules=["query", "value"]))
def begin():
    models = {"coefficients": coefficients(), "lora": lora()}
    return models, {way: torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=rate, weight_decay=0.0) for way, m in models.items()}
print(json.dumps({"version": f"torch {torch.__version__}, peft {peft.__version__}"}), flush=True)
for line in sys.stdin:
    asked = json.loads(line); way = asked["way"]
    if way == "begin": models, optimizers = begin(); print("{}", flush=True); continue
    model = models["coefficients" if way == "forward" else way]; times, cpu, losses = [], [], []
    for batch in asked["batches"]:
        ids, mask, target = (torch.tensor(batch[k]) for k in ("ids", "mask", "labels")); started, worked = time.perf_counter(), time.process_time()
        if way == "forward":
            with torch.no_grad(): losses.append(float(model(input_ids=ids, attention_mask=mask, labels=target).loss))
        else:
            loss = model(input_ids=ids, attention_mask=mask, labels=target).loss; loss.backward()
            torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0); optimizers[way].step(); optimizers[way].zero_grad(); losses.append(float(loss))
        times.append(1e3 * (time.perf_counter() - started)); cpu.append(1e3 * (time.process_time() - worked))
    print(json.dumps({"ms": times, "cpu": cpu, "losses": losses}), flush=True)
