"""Trains tasks with PEFT and transformers' Trainer, as examples/python/train.py does, and judges them; one thread.
usage: inside.py EXAMPLES MODEL
EXAMPLES: the folder examples/python. Prints {"version"}, then answers one line for each line of its input: {"way", "out", "steps", "batch",
"rate", "seed", "labels", "train": [[text, label]], "test"} → {"trained", "accuracy", "logits", "seconds"}. way: the components of a pack, coefficients
of which learn; or "lora": a LoRA of rank 8, alpha 16, on query and value. Accuracy on the test rows and logits of the first 16 are those
of a fresh model with the adapter that was saved."""
import contextlib, json, os, sys, time
os.environ["HF_HUB_OFFLINE"] = "1"
import peft, torch, transformers
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, set_seed

torch.set_num_threads(1)
examples, folder = sys.argv[1:]
sys.path.insert(0, examples)
# The folder of the examples is published as it is.
sys.dont_write_bytecode = True
from components import inside
from train import fit

tokenizer = AutoTokenizer.from_pretrained(folder)
tokens = lambda rows: tokenizer([text for text, _ in rows], truncation=True, max_length=32)["input_ids"]
lora = lambda: peft.LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=["query", "value"])


def train(task):
    base = lambda: AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(task["labels"]))
    set_seed(task["seed"])
    tuned = peft.get_peft_model(base(), lora()) if task["way"] == "lora" else inside(base(), task["way"], "SEQ_CLS")
    data = [{"input_ids": ids, "labels": label} for ids, (_, label) in zip(tokens(task["train"]), task["train"])]
    started = time.process_time()
    # Whole factors learn at a tenth of this rate.
    how = {"max_steps": task["steps"], "per_device_train_batch_size": task["batch"], "seed": task["seed"], "disable_tqdm": True}
    fit(tuned, data, DataCollatorWithPadding(tokenizer), task["out"], task["rate"], task["labels"], **how)
    seconds = time.process_time() - started
    saved = peft.PeftModel.from_pretrained(base(), task["out"]).eval()
    found = []
    with torch.no_grad():
        for at in range(0, len(task["test"]), 64):
            found.append(saved(**tokenizer.pad({"input_ids": tokens(task["test"][at : at + 64])}, return_tensors="pt")).logits)
    logits = torch.cat(found)
    right = (logits.argmax(-1) == torch.tensor([label for _, label in task["test"]])).double().mean()
    trained = sum(value.numel() for value in tuned.parameters() if value.requires_grad)
    return {"trained": trained, "accuracy": float(right), "logits": logits[:16].tolist(), "seconds": seconds}


versions = f"peft {peft.__version__}, transformers {transformers.__version__}, torch {torch.__version__}"
print(json.dumps({"version": versions}), flush=True)
for line in sys.stdin:
    with contextlib.redirect_stdout(sys.stderr):
        answer = train(json.loads(line))
    print(json.dumps(answer), flush=True)
