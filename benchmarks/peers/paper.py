"""VeRA and PiSSA by PEFT on the rows that the benchmark trains on.

Reads one JSON object from stdin: base (safetensors of the encoder), config (folder with config.json and the tokenizer), method, terms and
head (learning rates), seed, steps, batch, curve, labels, train [[text, label]], texts.  Prints one: version, trained, head, loss, logits.
AdamW, warm-up of a tenth, linear decay, gradients clipped at 1, no dropout, no weight decay: as the trainer of this package.
"""
import json, random, sys
import torch; torch.set_num_threads(1)
from peft import LoraConfig, TaskType, VeraConfig, get_peft_model
from peft import __version__ as peft_version
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import BertConfig, BertForSequenceClassification
from transformers import __version__ as transformers_version

job = json.load(sys.stdin)
torch.manual_seed(job["seed"])
tokenizer = Tokenizer.from_file(f"{job['config']}/tokenizer.json")
tokenizer.enable_truncation(32); tokenizer.enable_padding(pad_id=0)
config = BertConfig.from_pretrained(job["config"], num_labels=len(job["labels"]), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
base = BertForSequenceClassification(config)
missing, unexpected = base.bert.load_state_dict({name: value.float() for name, value in load_file(job["base"]).items()}, strict=False)
assert not unexpected and all("position_ids" in name for name in missing), (missing, unexpected)
torch.nn.init.normal_(base.classifier.weight, std=0.02); torch.nn.init.zeros_(base.classifier.bias)
common = dict(task_type=TaskType.SEQ_CLS, target_modules=["query", "value"])
model = get_peft_model(base, VeraConfig(r=256, projection_prng_key=job["seed"], **common) if job["method"] == "VeRA" else LoraConfig(r=8, lora_alpha=8, init_lora_weights="pissa", **common))

def encode(texts):
    found = tokenizer.encode_batch(texts)
    return dict(input_ids=torch.tensor([one.ids for one in found]), attention_mask=torch.tensor([one.attention_mask for one in found]))

parameters = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
head = [value for name, value in parameters if "classifier" in name]; terms = [value for name, value in parameters if "classifier" not in name]
optimizer = torch.optim.AdamW([dict(params=terms, lr=job["terms"]), dict(params=head, lr=job["head"])], weight_decay=0.0)
steps, warmup = job["steps"], job["steps"] // 10
schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (step + 1) / warmup if step < warmup else (steps - step) / (steps - warmup))
rows, order, losses = job["train"], [], []
shuffler = random.Random(job["seed"])
model.train()
while len(losses) < steps:
    if not order: order = rows[:]; shuffler.shuffle(order)
    some, order = order[:job["batch"]], order[job["batch"]:]
    loss = torch.nn.functional.cross_entropy(model(**encode([text for text, _ in some])).logits, torch.tensor([label for _, label in some]))
    optimizer.zero_grad(); loss.backward()
    torch.nn.utils.clip_grad_norm_(terms + head, 1.0)
    optimizer.step(); schedule.step(); losses.append(loss.item())
model.eval()
logits = []
with torch.no_grad():
    for at in range(0, len(job["texts"]), 32): logits += model(**encode(job["texts"][at:at + 32])).logits.tolist()
count = lambda values: sum(value.numel() for value in values)
print(json.dumps(dict(version=f"PEFT {peft_version}, torch {torch.__version__}, transformers {transformers_version}", trained=count(terms), head=count(head), loss=losses, logits=logits)))
