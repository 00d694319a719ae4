"""A tiny random CLIP and a tiny random ViT as local models of transformers.js, two adapters for each, and what they say of two pictures.

CLIP is there as one file, onnx/model.onnx, and as two, text_model.onnx and vision_model.onnx; the graphs are TorchScript's.
goldens.json is computed by PEFT in f64, without the exported graphs.

usage: python make_images.py    (torch 2.13, transformers 5.24, peft 0.21, onnx 1.23, tokenizers 0.23)
"""
import copy, json, pathlib, sys
HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "make"))
from graphs import Exported, axes, characters, exported, save, save_adapters, save_targets, with_adapters, write
import torch
from tokenizers import processors
from torch import nn
from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTForImageClassification

SIZE, HIDDEN, LAYERS = 8, 16, 1
START, END = "<|startoftext|>", "<|endoftext|>"
LABELS = ["a cat", "a truck", "rain"]
PROCESSOR = {"do_resize": True, "size": {"height": SIZE, "width": SIZE}, "resample": 3, "do_rescale": True, "rescale_factor": 1 / 255,
             "do_normalize": True, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}


def picture(number):
    """The same in JavaScript: bytes of [height, width, 3]."""
    return torch.tensor([(i * (37 + 60 * number) + i * i * 11) % 256 for i in range(SIZE * SIZE * 3)]).reshape(SIZE, SIZE, 3)


def pixels(dtype):
    return torch.stack([(picture(number).to(dtype) / 255 - 0.5) / 0.5 for number in range(2)]).permute(0, 3, 1, 2)


def randomised(model):
    model.config._attn_implementation = "eager"
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.35)
        elif "bias" in name:
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


@torch.no_grad()
def by_task(adapted, names, run):
    """Lists of the outputs that `run` gives, by task."""
    exact = copy.deepcopy(adapted).double()
    said = lambda model: {key: [round(value, 6) for value in one.flatten().tolist()] for key, one in run(model).items()}
    with exact.disable_adapter():
        found = {"base": said(exact.get_base_model())}
    for name in names:
        exact.set_adapter(name)
        found[name] = said(exact.get_base_model())
    return found


def keep(model, adapted, adapters, folder):
    folder.mkdir(exist_ok=True)
    save_targets(model, adapted, folder / "base.safetensors")
    save_adapters(adapted, adapters, folder / "adapters")
    write(folder / "config.json", {**model.config.to_diff_dict(), "architectures": [type(model).__name__]})


def mask4(mask):
    """Causal, and of a shape that no mask is made of again, since that cannot be traced."""
    length = mask.shape[1]
    reached = torch.arange(length)[:, None] >= torch.arange(length)[None, :]
    return torch.where(reached[None, None] & mask.bool()[:, None, None, :], 0.0, -1e9)


def clip():
    torch.manual_seed(1)
    folder = HERE / "clip"
    tokenizer = characters([START, END])
    size = tokenizer.get_vocab_size()
    side = dict(hidden_size=HIDDEN, intermediate_size=32, num_hidden_layers=LAYERS, num_attention_heads=2, projection_dim=8)
    # The last token is the end: CLIP takes what is said there.
    text = side | dict(vocab_size=size, max_position_embeddings=40, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    model = randomised(CLIPModel(CLIPConfig(text_config=text, vision_config=side | dict(image_size=SIZE, patch_size=4), projection_dim=8)))
    model.logit_scale.data.fill_(1.5)
    adapters = {"animals": dict(target_modules=["q_proj", "v_proj"]),
                "weather": dict(target_modules=["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "text_projection", "visual_projection"])}
    adapted = with_adapters(model, adapters, std=0.3, r=2, lora_alpha=4)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{START} $A {END}", special_tokens=[(START, 0), (END, 1)])
    rows = [tokenizer.encode(f"This is a photo of {label}").ids for label in LABELS]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [1] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])

    def run(model):
        found = model(input_ids=ids, attention_mask=mask, pixel_values=pixels(torch.float64))
        return {"logits": found.logits_per_image, "text": model.text_projection(model.text_model(input_ids=ids, attention_mask=mask).pooler_output),
                "image": model.visual_projection(model.vision_model(pixel_values=pixels(torch.float64)).pooler_output)}

    goldens = by_task(adapted, adapters, run)
    keep(model, adapted, adapters, folder)
    tokens, images = axes("text_batch", "length"), axes("image_batch")
    given = {"input_ids": tokens, "attention_mask": tokens}
    text_of = lambda ids, mask: model.text_projection(model.text_model(input_ids=ids, attention_mask=mask4(mask)).pooler_output)
    image_of = lambda pixels: model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)

    def whole(ids, mask, pixels):
        """CLIP as transformers.js calls it."""
        found = model(input_ids=ids, attention_mask=mask4(mask), pixel_values=pixels)
        return found.logits_per_image, found.logits_per_text, found.text_embeds, found.image_embeds

    save(exported(Exported(model, whole), (ids, mask, pixels(torch.float32)), given | {"pixel_values": images},
                  {"logits_per_image": axes("image_batch", "text_batch"), "logits_per_text": axes("text_batch", "image_batch"),
                   "text_embeds": axes("text_batch"), "image_embeds": images}), folder / "onnx/model.onnx")
    save(exported(Exported(model, text_of, ["text_model", "text_projection"]), (ids, mask), given, {"text_embeds": axes("text_batch")}), folder / "onnx/text_model.onnx")
    save(exported(Exported(model, image_of, ["vision_model", "visual_projection"]), (pixels(torch.float32),), {"pixel_values": images}, {"image_embeds": images}), folder / "onnx/vision_model.onnx")
    tokenizer.save(str(folder / "tokenizer.json"))
    write(folder / "tokenizer_config.json", {"tokenizer_class": "CLIPTokenizer", "bos_token": START, "eos_token": END, "pad_token": END,
                                             "unk_token": END, "model_max_length": 40, "clean_up_tokenization_spaces": False})
    write(folder / "preprocessor_config.json", PROCESSOR | {"image_processor_type": "CLIPImageProcessor"})
    (folder / "goldens.json").write_text(json.dumps({"labels": LABELS, "answers": goldens}) + "\n")


def vit():
    torch.manual_seed(2)
    folder = HERE / "vit"
    labels = {number: f"base {number}" for number in range(4)}
    config = ViTConfig(hidden_size=HIDDEN, intermediate_size=32, num_hidden_layers=LAYERS, num_attention_heads=2, image_size=SIZE, patch_size=4,
                       hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, id2label=labels,
                       label2id={name: number for number, name in labels.items()})
    model = randomised(ViTForImageClassification(config))
    attention = ["q_proj", "v_proj"] if any(name.endswith("q_proj") for name, _ in model.named_modules()) else ["query", "value"]
    adapters = {"birds": dict(target_modules=attention, modules_to_save=["classifier"]), "fish": dict(target_modules=attention)}
    adapted = with_adapters(model, adapters, std=0.3, r=2, lora_alpha=4)
    goldens = by_task(adapted, adapters, lambda model: {"logits": model(pixels(torch.float64)).logits})
    keep(model, adapted, adapters, folder)
    images = axes("batch")
    logits = lambda pixels: model.classifier(model.vit(pixels).last_hidden_state[:, 0])
    save(exported(Exported(model, logits), (pixels(torch.float32),), {"pixel_values": images}, {"logits": images}), folder / "onnx/model.onnx")
    write(folder / "preprocessor_config.json", PROCESSOR | {"image_processor_type": "ViTImageProcessor"})
    (folder / "goldens.json").write_text(json.dumps({"answers": goldens}) + "\n")


clip()
vit()
