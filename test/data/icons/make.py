"""Ten tasks of icons, a small ViT that has seen other icons, and one LoRA of PEFT per task.

A task tells eight concepts apart ("camera", "lock"). Its rows are what the icon sets of the npm package @iconify/json draw under that name,
32 × 32 pixels of 16 greys, white on black, over another icon in grey; sets under MIT, Apache 2.0, ISC, BSD, CC0 or the Unlicense only. A third of the sets, by family, is for tests: nothing
here trains on them. A test row that nearly equals a training row of its task is left out (sets copy each other). The ViT learns the other
concepts, without any whose name holds a word of a task's, in black on white alone.

usage: npm pack @iconify/json@2.2.535; tar xzf iconify-json-2.2.535.tgz
       python make.py rows PACKAGE WORK    python make.py vit WORK    python make.py adapters WORK
       (resvg-py 0.5 for rows; torch 2.13, transformers 5.24, peft 0.21 and onnx 1.23 for the rest)
"""
import collections, gzip, hashlib, io, json, pathlib, random, re, sys, time, warnings

HERE = pathlib.Path(__file__).parent
SIZE, GREYS, PATCH = 32, 15, 8
CLASSES, PER_SET, TEST_SHARE, NEAR = 8, 3, 0.33, 0.1
LICENCES = {"MIT", "Apache-2.0", "ISC", "CC0-1.0", "BSD-3-Clause", "Unlicense"}
STYLE = re.compile(r"[-_](outlined?|line|filled?|fill|solid|bold|duotone|thin|light|regular|rounded?|sharp|twotone|two-tone|linear|broken|alt|o|f|l|s|\d+)$")
# Sets of one drawer, as far as their prefixes do not say so.
FAMILIES = {"bxs": "bx", "bxl": "bx", "boxicons": "bx", "ic": "material", "mdi": "material", "uim": "uil", "uit": "uil", "uis": "uil", "lucide": "feather",
            "ei": "evil", "weui": "wechat", "fe": "feather", "eva": "eva", "iconoir": "iconoir", "teenyicons": "teeny", "famicons": "ion", "sidekickicons": "heroicons"}
CONCEPTS = """calendar star link search heart bookmark home folder camera arrow-left lock flag arrow-right share download clock tag pause play filter
arrow-up arrow-down moon eye check globe key book shield plus cloud upload sun phone user minus credit-card clipboard bell pin briefcase rocket compass
code trash gift chevron-right chevron-left map copy circle archive table trophy keyboard inbox image chevron-up chevron-down refresh menu database bug
square pencil info file calculator zoom-out zoom-in wallet printer shopping-bag wifi terminal microphone list laptop car umbrella""".split()
# Other names of these, which the ViT must not learn either.
SYNONYMS = """favorite love time watch world earth house email envelope delete remove bin garbage picture photo gallery reload sync hamburger document page
edit pen magnifier zoom location marker place mobile telephone call person people account profile account add close x cross present label price award cup
wallet purse print bag mic hyperlink chain notification alarm insect automobile vehicle console prompt night weather visibility view see caret angle
left right up down""".split()


def rendered(body, box, resvg):
    """Ink of each pixel, 0 … 15."""
    from PIL import Image
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="{SIZE}" height="{SIZE}" viewBox="{" ".join(map(str, box))}" color="#000">{body}</svg>'
    image = Image.open(io.BytesIO(bytes(resvg(svg_string=svg, background="#ffffff", width=SIZE, height=SIZE, skip_system_fonts=True)))).convert("L")
    return bytes((255 - value + 8) // 17 for value in image.tobytes())


def concept(name):
    while (shorter := STYLE.sub("", name)) != name:
        name = shorter
    return name


def icon_sets(package):
    collected = json.loads((package / "collections.json").read_text())
    for prefix, info in sorted(collected.items()):
        if info["license"].get("spdx") in LICENCES and not info.get("palette"):
            yield prefix, info, json.loads((package / f"json/{prefix}.json").read_text())


def family(prefix):
    return FAMILIES.get(prefix, prefix.split("-")[0])


def near(one, others):
    import numpy as np
    own = np.frombuffer(one, np.uint8).astype(np.int16)
    return bool((np.abs(others - own).sum(1) < NEAR * (others.sum(1) + own.sum())).any())


def shown(rows):
    """White on black, over another of the rows in grey, as the ViT has never seen them."""
    turn = lambda ink: bytes(ink[(y + 9) % SIZE * SIZE + (x + 13) % SIZE] for y in range(SIZE) for x in range(SIZE))
    others = random.Random(2).sample(rows, len(rows))
    return [bytes(GREYS - max(ink, under // 2) for ink, under in zip(row[3], turn(other[3]))) for row, other in zip(rows, others)]


def rows(package, work):
    """WORK/rows.json: [concept, set:icon, whether for tests, ink in hexadecimal] of all concepts that twenty sets draw; tasks and their pixels."""
    import numpy as np
    from resvg_py import svg_to_bytes
    sets, found = {}, collections.defaultdict(list)
    for prefix, info, icons in icon_sets(package):
        sets[prefix] = {"name": info["name"], "author": info["author"]["name"], "url": info["author"].get("url", ""), "licence": info["license"]["spdx"]}
        of_set = collections.Counter()
        for name, icon in sorted(icons["icons"].items()):
            box = [icon.get(key, icons.get(key, default)) for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))]
            if of_set[concept(name)] < PER_SET and "<animate" not in icon["body"]:
                of_set[concept(name)] += 1
                found[concept(name)].append((prefix, name, icon["body"], box))
    tests = {prefix for prefix in sets if int(hashlib.sha256(family(prefix).encode()).hexdigest(), 16) % 1000 < 1000 * TEST_SHARE}
    words = {word for one in CONCEPTS for word in one.split("-")} | set(SYNONYMS)
    wanted = CONCEPTS + sorted(name for name, drawn in found.items()
                               if len({prefix for prefix, *_ in drawn}) >= 18 and len(name) > 1 and not words & set(re.split("[-_]", name)))
    kept = []
    for name in wanted:
        for prefix, icon, body, box in found[name]:
            try:
                ink = rendered(body, box, svg_to_bytes)
            except ValueError:
                continue
            if any(ink):
                kept.append((name, f"{prefix}:{icon}", prefix in tests, ink))
    print(len(sets), "sets", len(tests), "for tests", len(wanted), "concepts", len(kept), "rows")
    (work / "rows.json").write_text(json.dumps([(name, icon, test, ink.hex()) for name, icon, test, ink in kept]))
    order = random.Random(1).sample(CONCEPTS, len(CONCEPTS))
    pixels, tasks, used = [], {}, set()
    for number in range(len(CONCEPTS) // CLASSES):
        labels = sorted(order[number * CLASSES:(number + 1) * CLASSES])
        own = [row for row in kept if row[0] in labels]
        train, test, dropped = [], [], 0
        for row in own:
            seen = {one[3] for one in train}
            if not row[2] and row[3] not in seen:
                train.append(row)
        matrix = np.array([np.frombuffer(row[3], np.uint8) for row in train]).astype(np.int16)
        for row in own:
            if row[2]:
                if near(row[3], matrix): dropped += 1
                else: test.append(row)
        random.Random(number).shuffle(train); random.Random(number).shuffle(test)
        tasks[f"icons-{number}"] = {"labels": labels, **{split: [[row[1], labels.index(row[0])] for row in some] for split, some in (("train", train), ("test", test))}}
        pixels += shown(train) + shown(test)
        used |= {row[1].split(":")[0] for row in train + test}
        print(number, labels, len(train), len(test), "dropped", dropped, flush=True)
    (HERE / "tasks.json").write_text("{\n" + ",\n".join(f"{json.dumps(name)}: {json.dumps(task, separators=(',', ':'))}" for name, task in tasks.items()) + "\n}\n")
    packed = np.frombuffer(b"".join(pixels), np.uint8)
    with gzip.GzipFile(HERE / "pixels.gz", "wb", 9, mtime=0) as file:
        file.write((packed[::2] * 16 + packed[1::2]).tobytes())
    (HERE / "sets.json").write_text(json.dumps({prefix: sets[prefix] for prefix in sorted(used)}, indent=1, ensure_ascii=False) + "\n")


def config(classes):
    from transformers import ViTConfig
    return ViTConfig(hidden_size=96, intermediate_size=192, num_hidden_layers=4, num_attention_heads=4, image_size=SIZE, patch_size=PATCH, num_channels=1,
                     hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=classes, initializer_range=0.1)


def pixel_values(ink):
    return ink.float() / GREYS / 0.3  # Paper is 0, so that only ink says something.


def moved(pixels, generator):
    """A little shifted, all by the same."""
    import torch
    return torch.roll(pixels, torch.randint(-2, 3, (2,), generator=generator).tolist(), (2, 3))


def schedule(optimizer, steps, warmup):
    import torch
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (step + 1) / warmup if step < warmup else (steps - step) / (steps - warmup))


def vit(work, epochs=16, batch=96):
    """WORK/vit.safetensors: the ViT without a head, after the other concepts' rows that are not for tests."""
    import torch
    from safetensors.torch import save_file
    from transformers import ViTForImageClassification
    torch.set_num_threads(1); torch.manual_seed(0)
    some = [row for row in json.loads((work / "rows.json").read_text()) if not row[2] and row[0] not in CONCEPTS]
    names = sorted({row[0] for row in some})
    random.Random(0).shuffle(some)
    pixels = pixel_values(torch.tensor([list(bytes.fromhex(row[3])) for row in some], dtype=torch.uint8)).reshape(-1, 1, SIZE, SIZE)
    labels = torch.tensor([names.index(row[0]) for row in some])
    held = len(some) // 20
    model, generator = ViTForImageClassification(config(len(names))), torch.Generator().manual_seed(0)
    print(len(some), "rows", len(names), "concepts", sum(one.numel() for one in model.vit.parameters()), "numbers", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    steps = epochs * ((len(some) - held) // batch)
    plan, started = schedule(optimizer, steps, steps // 20), time.time()
    for epoch in range(epochs):
        model.train()
        for rows in (held + torch.randperm(len(some) - held, generator=generator)).split(batch)[:(len(some) - held) // batch]:
            loss = torch.nn.functional.cross_entropy(model(moved(pixels[rows], generator)).logits, labels[rows], label_smoothing=0.05)
            optimizer.zero_grad(); loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step(); plan.step()
        model.eval()
        with torch.no_grad():
            right = (model(pixels[:held]).logits.argmax(1) == labels[:held]).float().mean().item()
        print(epoch, round(loss.item(), 3), "held back:", round(right, 3), round(time.time() - started), "s", flush=True)
    save_file(model.vit.state_dict(), work / "vit.safetensors")


def read_tasks():
    """Of each task its labels, and for train and test the pixels [rows, 1, 32, 32] and the labels' numbers."""
    import numpy as np, torch
    packed = np.frombuffer(gzip.decompress((HERE / "pixels.gz").read_bytes()), np.uint8)
    pixels = pixel_values(torch.tensor(np.stack([packed >> 4, packed & 15], 1).reshape(-1, 1, SIZE, SIZE)))
    at = 0
    for name, task in json.loads((HERE / "tasks.json").read_text()).items():
        found = {"labels": task["labels"]}
        for split in ("train", "test"):
            found[split] = pixels[at:at + len(task[split])], torch.tensor([label for _, label in task[split]])
            at += len(task[split])
        yield name, found


def with_head(work, labels):
    import torch
    from safetensors.torch import load_file
    from transformers import ViTForImageClassification
    torch.manual_seed(0)
    model = ViTForImageClassification(config(len(labels)))
    model.vit.load_state_dict({name: value.half().float() for name, value in load_file(work / "vit.safetensors").items()})
    torch.nn.init.normal_(model.classifier.weight, std=0.02); torch.nn.init.zeros_(model.classifier.bias)
    return model


def export(work):
    """model_fp16.onnx: TorchScript's, opset 17, f16 initializers behind Casts, a head of random values."""
    import numpy as np, torch
    from onnx import TensorProto, helper, numpy_helper
    sys.path.insert(0, str(HERE.parent / "make"))
    from graphs import axes, exported, save

    class Logits(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.vit, self.classifier = model.vit, model.classifier

        def forward(self, pixel_values):
            return self.classifier(self.vit(pixel_values).last_hidden_state[:, 0])

    model = with_head(work, range(CLASSES)).eval()
    model.config._attn_implementation = "eager"
    graph = exported(Logits(model), (torch.zeros(2, 1, SIZE, SIZE),), {"pixel_values": axes("batch")}, {"logits": axes("batch")})
    casts = []
    for tensor in graph.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and int(np.prod(tensor.dims)) > 64:
            name = tensor.name
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), f"{name}_f16"))
            casts.append(helper.make_node("Cast", [f"{name}_f16"], [name], name=f"{name}_cast", to=TensorProto.FLOAT))
    for cast in reversed(casts):
        graph.graph.node.insert(0, cast)
    save(graph, HERE / "model_fp16.onnx")
    (HERE / "config.json").write_text(json.dumps({**model.config.to_diff_dict(), "architectures": ["ViTForImageClassification"]}, indent=2) + "\n")


def adapters(work, steps=160, batch=32):
    """adapters/: one LoRA a task, all from one seed; reference.json: what PEFT says of the test rows."""
    import torch
    from peft import LoraConfig, get_peft_model
    torch.set_num_threads(1)
    export(work)
    reference = {}
    for name, task in read_tasks():
        model = get_peft_model(with_head(work, task["labels"]), LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"]))
        trained = [one for one in model.parameters() if one.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=3e-3, weight_decay=0.01)
        plan, order = schedule(optimizer, steps, 15), []
        (pixels, labels), started = task["train"], time.time()
        for step in range(steps):
            if len(order) < batch:
                order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(step)).tolist()
            some, order = order[:batch], order[batch:]
            loss = torch.nn.functional.cross_entropy(model(pixel_values=pixels[some]).logits, labels[some])
            optimizer.zero_grad(); loss.backward(); optimizer.step(); plan.step()
        model.eval()
        with torch.no_grad():
            logits = model(pixel_values=task["test"][0]).logits
        accuracy = (logits.argmax(1) == task["test"][1]).float().mean().item()
        print(name, round(loss.item(), 3), "test:", round(accuracy, 3), round(time.time() - started), "s", flush=True)
        folder = HERE / "adapters" / name
        model.peft_config["default"].base_model_name_or_path = "icons-vit"
        model.save_pretrained(folder, save_embedding_layers=False)
        (folder / "README.md").unlink()
        reference[name] = {"accuracy": accuracy, "predictions": logits.argmax(1).tolist(), "logits16": [[round(value, 5) for value in row] for row in logits[:16].tolist()]}
    (HERE / "reference.json").write_text("{\n" + ",\n".join(f"{json.dumps(name)}: {json.dumps(one, separators=(',', ':'))}" for name, one in reference.items()) + "\n}\n")


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    what, *paths = sys.argv[1:]
    {"rows": rows, "vit": vit, "adapters": adapters}[what](*map(pathlib.Path, paths))
