"""Trains a LoRA (r 8, alpha 16, attention) with PEFT and writes its folder.  usage: llm_learn.py MODEL_DIR FOLDER SEED STEPS BATCH RATE < rows
Rows: JSON [{prompt, answer}] of token ids; the loss is of the answers. AdamW, a tenth of the steps to warm up, then down to 0, gradients
clipped at 1. A step's rows lie in one sequence, what their prompts begin with once, and a mask keeps each from the others: the same numbers
as those of a padded batch, in half the time. Prints JSON: versions, how many numbers are trained, the last losses."""
import json, sys, torch, peft, transformers
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
model_dir, folder, (seed, steps, batch), rate = sys.argv[1], sys.argv[2], map(int, sys.argv[3:6]), float(sys.argv[6])
rows = json.load(sys.stdin)
torch.manual_seed(seed)
base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
config = peft.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
adapted = peft.get_peft_model(base, config)
model = adapted.base_model.model
trained = [p for p in adapted.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trained, rate, weight_decay=0.0)
warmup = steps // 10
schedule = torch.optim.lr_scheduler.LambdaLR(
    optimizer, lambda t: (t + 1) / warmup if t < warmup else 1 - (t - warmup) / (steps - warmup))
common = next(i for i in range(len(rows[0]["prompt"])) if any(r["prompt"][: i + 1] != rows[0]["prompt"][: i + 1] for r in rows))


def sequence(some):
    """ids, positions, additive mask, places of what says the answers, and the answers."""
    ids = rows[0]["prompt"][:common]
    places, owner, where, wanted = list(range(common)), [0] * common, [], []
    for number, row in enumerate(some, 1):
        own = row["prompt"][common:] + row["answer"][:-1]
        first = len(ids) + len(row["prompt"]) - common - 1
        where += range(first, first + len(row["answer"]))
        wanted += row["answer"]
        places += range(common, common + len(own))
        owner += [number] * len(own)
        ids = ids + own
    owner = torch.tensor(owner)
    seen = ((owner[:, None] == owner[None]) | (owner[None] == 0)) & torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]
    return torch.tensor([ids]), torch.tensor([places]), mask, torch.tensor(where), torch.tensor(wanted)


order, losses = [], []
for _ in range(steps):
    while len(order) < batch:
        order += torch.randperm(len(rows)).tolist()
    some, order = [rows[i] for i in order[:batch]], order[batch:]
    ids, places, mask, where, wanted = sequence(some)
    hidden = model.model(input_ids=ids, position_ids=places, attention_mask=mask, use_cache=False).last_hidden_state
    loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[0, where]), wanted)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad(set_to_none=True)
    losses.append(loss.item())
adapted.save_pretrained(folder)
version = f"peft {peft.__version__}, transformers {transformers.__version__}, torch {torch.__version__}"
print(json.dumps({"version": version, "trained": sum(p.numel() for p in trained), "losses": losses[-10:]}))
