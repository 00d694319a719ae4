"""Adapters of a language model held as PEFT holds them.  usage: llm_memory.py MODEL_DIR COUNT ADAPTER_DIR...
Adapters are repeated up to COUNT under other names; COUNT 0 is the model alone. Prints JSON: resident and peak bytes."""
import gc, json, sys, torch, peft, transformers
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
def status(field): return int(next(l for l in open("/proc/self/status") if l.startswith(field)).split()[1]) * 1024
count, folders = int(sys.argv[2]), sys.argv[3:]
m = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
for i in range(count):
    path, name = folders[i % len(folders)], f"a{i}"
    if i == 0: m = peft.PeftModel.from_pretrained(m, path, adapter_name=name)
    else: m.load_adapter(path, adapter_name=name)
with torch.no_grad(): m(input_ids=torch.tensor([[500, 600]]))
gc.collect()
print(json.dumps({"version": f"peft {peft.__version__}, transformers {transformers.__version__}, torch {torch.__version__}", "resident": status("VmRSS"), "peak": status("VmHWM")}))
