"""Tiny BERT-like models as onnxruntime's optimiser fuses them, adapters for them, and PEFT's logits.

The optimiser puts queries, keys and values of an attention into one operator, biases into the norms and activations behind them,
and the embeddings into one. goldens.json is computed by PEFT in f64, without the exported graphs.

usage: python make.py    (torch 2.13, transformers 5, peft 0.21, onnxruntime, onnx)
"""
import copy, pathlib, sys, tempfile
HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "make"))
from graphs import Exported, axes, torchscript, write_rounded
import numpy as np, onnx, torch
from onnxruntime.transformers import optimizer
from onnxruntime.transformers.fusion_options import FusionOptions
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers import (BertConfig, BertForSequenceClassification, DistilBertConfig, DistilBertForSequenceClassification,
                          RobertaConfig, RobertaForSequenceClassification)

ROWS = [[5, 9, 13, 21, 3, 7], [33, 2, 30, 8, 1, 1]]
MASK = [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]
SIZES = dict(vocab_size=40, max_position_embeddings=16, num_labels=3, attn_implementation="eager")
WIDTHS = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
KINDS = {
    "bert": (BertForSequenceClassification, BertConfig(**SIZES, **WIDTHS), ["query", "key", "value"], "attention.output.dense"),
    "roberta": (RobertaForSequenceClassification, RobertaConfig(**SIZES, **WIDTHS, pad_token_id=1), ["query", "key", "value"], "attention.output.dense"),
    "distilbert": (DistilBertForSequenceClassification, DistilBertConfig(**SIZES, dim=16, n_layers=2, n_heads=2, hidden_dim=32),
                   ["q_lin", "k_lin", "v_lin"], "out_lin"),
}
# Name of the file, the model that it is of, and whether the mask stays as it is: otherwise it is the lengths of the rows.
FILES = [("bert", "bert", False), ("bert-mask", "bert", True), ("roberta", "roberta", False), ("distilbert", "distilbert", True)]


def base(kind):
    make, config, *_ = KINDS[kind]
    torch.manual_seed(1)
    model = make(config).eval()
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=1.0 if "LayerNorm.weight" in name or "layer_norm.weight" in name else 0.0, std=0.2)
    return model


def export(model, kind, raw, path):
    plain = Exported(model, lambda ids, mask: model(input_ids=ids, attention_mask=mask).logits)
    inputs = {name: axes("batch", "sequence") for name in ("input_ids", "attention_mask")}
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "model.onnx"
        onnx.save(torchscript(plain, (torch.tensor(ROWS), torch.tensor(MASK)), inputs, {"logits": None}, opset=14), file)
        options = FusionOptions("bert")
        options.use_raw_attention_mask(raw)
        fused = optimizer.optimize_model(str(file), model_type="bert", num_heads=2, hidden_size=16, opt_level=0, optimization_options=options)
        kinds = [node.op_type for node in fused.model.graph.node]
        assert kinds.count("Attention") == 2 and kinds.count("SkipLayerNormalization") == 4, kinds
        fused.save_model_to_file(str(path))


def adapt(model, kind):
    _, _, (q, k, v), output = KINDS[kind]
    adapters = {
        "all": dict(target_modules=[q, k, v, output, *(["lin1", "lin2"] if kind == "distilbert" else ["intermediate.dense", "output.dense"])]),
        "few": dict(target_modules=[q, v, output]),
        "dora": dict(target_modules=[q, k], use_dora=True),
        "biases": dict(target_modules=[v], bias="all"),
    }
    torch.manual_seed(4)
    answers = {}
    for id, how in adapters.items():
        # Each on a model of its own: biases are of one adapter only.
        adapted = get_peft_model(copy.deepcopy(model), LoraConfig(task_type="SEQ_CLS", r=2, lora_alpha=4, **how)).eval()
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or ("modules_to_save" in name):
                nn.init.normal_(parameter, std=0.2)
            if "magnitude" in name:
                parameter.data *= 1 + 0.2 * torch.rand_like(parameter)
            if id == "biases" and name.endswith(".bias") and "original" not in name:
                parameter.data += 0.2 * torch.randn_like(parameter)
        adapted.save_pretrained(HERE / "adapters" / kind / id)
        (HERE / "adapters" / kind / id / "README.md").unlink(missing_ok=True)
        answers[id] = logits(adapted.double())
    return answers


@torch.no_grad()
def logits(model):
    return model(input_ids=torch.tensor(ROWS), attention_mask=torch.tensor(MASK)).logits.flatten().tolist()


goldens = {"rows": ROWS, "mask": MASK, "logits": {}}
for kind in KINDS:
    model = base(kind)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, HERE / f"{kind}.safetensors")
    goldens["logits"][kind] = adapt(model, kind)
    for name, of, raw in FILES:
        if of == kind:
            export(model, kind, raw, HERE / f"{name}.onnx")
    goldens["logits"][kind]["base"] = logits(model.double())
write_rounded(HERE / "goldens.json", goldens)
print({kind: {id: np.round(one, 3).tolist() for id, one in answers.items()} for kind, answers in goldens["logits"].items()})
