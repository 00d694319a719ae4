"""Training steps of a LoRA (r 8, attention) as PEFT makes them.  usage: llm_step.py MODEL_DIR STEPS < rows
Rows: JSON [{prompt, answer}] of token ids; the loss is of the answers. Prints JSON: CPU milliseconds of the fastest step, peak bytes."""
import json, sys, time, torch, peft, transformers
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
rows = json.load(sys.stdin)
m = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
m = peft.get_peft_model(m, peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))
width = max(len(r["prompt"]) + len(r["answer"]) for r in rows)
ids, labels, mask = (torch.full((len(rows), width), v) for v in (0, -100, 0))
for i, r in enumerate(rows):
    n = len(r["prompt"] + r["answer"])
    ids[i, :n] = torch.tensor(r["prompt"] + r["answer"])
    labels[i, len(r["prompt"]) : n] = torch.tensor(r["answer"])
    mask[i, :n] = 1
optimizer = torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], 1e-3)
best = float("inf")
for _ in range(int(sys.argv[2]) + 1):
    begun = time.process_time()
    m(input_ids=ids, labels=labels, attention_mask=mask).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    best = min(best, time.process_time() - begun)
peak = int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024
print(json.dumps({"version": f"peft {peft.__version__}, transformers {transformers.__version__}, torch {torch.__version__}", "ms": 1e3 * best, "peak": peak}))
