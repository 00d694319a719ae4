"""Adapters held as PEFT holds them, on the model.  usage: memory.py MODEL_DIR COUNT ADAPTER_DIR...
Adapters are repeated up to COUNT under other names. Prints JSON: resident bytes that the adapters add."""
import gc, json, os, pathlib, sys, torch, peft
from transformers import BertConfig, BertModel
from safetensors.torch import load_file
torch.set_num_threads(1)
def rss(): gc.collect(); return int(next(l for l in open("/proc/self/status") if l.startswith("VmRSS")).split()[1]) * 1024
config = json.loads((pathlib.Path(sys.argv[1]) / "config.json").read_text()); count = int(sys.argv[2]); folders = sys.argv[3:]
heads = []
m = peft.get_peft_model(BertModel(BertConfig(**config)), peft.LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"]), adapter_name="warm-up")
before = rss()
for i in range(count):
    w = load_file(pathlib.Path(folders[i % len(folders)]) / "adapter_model.safetensors"); n = f"a{i}"
    m.add_adapter(n, peft.LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"]))
    peft.set_peft_model_state_dict(m, {k.replace("base_model.model.bert.", "base_model.model."): v for k, v in w.items() if "lora_" in k}, adapter_name=n)
    heads.append({k: v.clone() for k, v in w.items() if "classifier" in k})
print(json.dumps({"version": f"peft {peft.__version__}, torch {torch.__version__}", "bytes": rss() - before}))
