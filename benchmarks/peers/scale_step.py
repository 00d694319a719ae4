"""Training steps of a LoRA (r 16, all linear layers) as PEFT makes them, on a model of a real shape with random weights in f32.
usage: scale_step.py SIZE STEPS < rows    (SIZE: as scale_model.py has it)
Rows: JSON [[ids, learned]]: token ids, and how many at the end are learned. Prints JSON: CPU milliseconds of the fastest step, peak bytes."""
import json, pathlib, sys, time, torch, peft
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "lib"))
import scale_model
torch.set_num_threads(1)
m = scale_model.random_model(sys.argv[1])
linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
m = peft.get_peft_model(m, peft.LoraConfig(r=scale_model.RANK, lora_alpha=2 * scale_model.RANK, target_modules=linear))
rows = json.load(sys.stdin)
ids = torch.tensor([r[0] for r in rows])
labels = torch.tensor([[-100] * (len(r[0]) - r[1]) + r[0][-r[1] :] for r in rows])
optimizer = torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], 1e-3)
best = float("inf")
for _ in range(int(sys.argv[2]) + 1):
    begun = time.process_time()
    m(input_ids=ids, labels=labels).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    best = min(best, time.process_time() - begun)
peak = int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024
print(json.dumps({"version": f"peft {peft.__version__}, torch {torch.__version__}", "ms": 1e3 * best, "peak": peak}))
