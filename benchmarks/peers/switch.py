"""PEFT's task switch on merged weights (unmerge_adapter + set_adapter + merge_adapter), and on unmerged ones (set_adapter alone).
usage: switch.py MODEL_DIR ADAPTER_DIR...
Random weights of the model's shapes: the time does not depend on the values. Prints JSON: milliseconds per switch, one thread."""
import json, pathlib, statistics, sys, time, torch, peft
from transformers import BertConfig, BertForSequenceClassification
torch.set_num_threads(1)
config = json.loads((pathlib.Path(sys.argv[1]) / "config.json").read_text()); folders = sys.argv[2:]
labels = len(json.loads((pathlib.Path(folders[0]) / "task.json").read_text())["labels"])
model = BertForSequenceClassification(BertConfig(**{**config, "num_labels": labels}))
names = [pathlib.Path(f).name for f in folders]
m = peft.PeftModel.from_pretrained(model, folders[0], adapter_name=names[0]).eval()
for n, f in zip(names[1:], folders[1:]): m.load_adapter(f, adapter_name=n)
def merged(n): m.unmerge_adapter(); m.set_adapter(n); m.merge_adapter()
def timed(switch):
    times = []
    for rounds in range(8):
        for n in names:
            t = time.perf_counter(); switch(n); d = 1e3 * (time.perf_counter() - t)
            if rounds >= 2: times.append(d)
    return {"median": statistics.median(times), "min": min(times)}
with torch.no_grad():
    m.merge_adapter(); folded = timed(merged)
    m.unmerge_adapter(); beside = timed(m.set_adapter)
print(json.dumps({"version": f"peft {peft.__version__}, torch {torch.__version__}", "folded": folded, "beside": beside}))
