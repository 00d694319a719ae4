"""LoRA and VeRA by PEFT on the icons that the benchmark trains on, one thread.

usage: images.py BASE.safetensors ICONS. BASE: every weight of the ViT but the head. ICONS: folder with config.json, tasks.json and pixels.gz.
Prints {"version"}, then answers each line of its input, {"method": "LoRA" | "VeRA", "terms", "head", "seed", "steps", "batch", "labels", "train": [[name, label]],
"texts": [name]}, with one: {"version", "trained", "head", "loss", "logits"}.
AdamW, warm-up of a tenth, linear decay, gradients clipped at 1, no dropout, no weight decay: as the trainer of this package.
"""
import gzip, json, pathlib, random, sys
import numpy as np, torch; torch.set_num_threads(1)
from peft import LoraConfig, VeraConfig, get_peft_model
from peft import __version__ as peft_version
from safetensors.torch import load_file
from transformers import ViTConfig, ViTForImageClassification
from transformers import __version__ as transformers_version

base, icons = load_file(sys.argv[1]), pathlib.Path(sys.argv[2])
version = f"PEFT {peft_version}, torch {torch.__version__}, transformers {transformers_version}"
packed = np.frombuffer(gzip.decompress((icons / "pixels.gz").read_bytes()), np.uint8)
pixels = torch.tensor(np.stack([packed >> 4, packed & 15], 1).reshape(-1, 1, 32, 32)).float() / 15 / 0.3
names = [name for task in json.loads((icons / "tasks.json").read_text()).values() for split in ("train", "test") for name, _ in task[split]]
number = {name: at for at, name in enumerate(names)}
given = lambda some: pixels[[number[name] for name in some]]
count = lambda values: sum(value.numel() for value in values)
settings = {key: value for key, value in json.loads((icons / "config.json").read_text()).items() if key not in ("id2label", "label2id", "architectures")}


def adapted(job):
    torch.manual_seed(job["seed"])
    model = ViTForImageClassification(ViTConfig(**settings, num_labels=len(job["labels"])))
    missing, unexpected = model.load_state_dict({name: value.float() for name, value in base.items()}, strict=False)
    assert not unexpected and all("classifier" in name for name in missing), (missing, unexpected)
    torch.nn.init.normal_(model.classifier.weight, std=0.02); torch.nn.init.zeros_(model.classifier.bias)
    common = dict(target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    return get_peft_model(model, VeraConfig(r=256, projection_prng_key=job["seed"], **common) if job["method"] == "VeRA" else LoraConfig(r=8, lora_alpha=8, **common))


def answer(job):
    model = adapted(job)
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
        loss = torch.nn.functional.cross_entropy(model(pixel_values=given([name for name, _ in some])).logits, torch.tensor([label for _, label in some]))
        optimizer.zero_grad(); loss.backward()
        torch.nn.utils.clip_grad_norm_(terms + head, 1.0)
        optimizer.step(); schedule.step(); losses.append(loss.item())
    model.eval()
    with torch.no_grad(): logits = model(pixel_values=given(job["texts"])).logits.tolist()
    return dict(version=version, trained=count(terms), head=count(head), loss=losses, logits=logits)


print(json.dumps({"version": version}), flush=True)
for line in sys.stdin: print(json.dumps(answer(json.loads(line))), flush=True)
