"""A tiny language model whose head is tied to its embedding, adapters that meet the tie or begin from a changed base, and PEFT's logits.

usage: make_tied_goldens.py OUT_DIR    (torch 2.13, transformers 5.24, peft 0.21.2, onnx 1.23, onnxruntime 1.32)
base.safetensors is what save_pretrained writes, without lm_head.weight; torchscript.onnx, dynamo.onnx and q4.onnx (head in 4 bits) are its
exports, untied.onnx that of the same weights with another head. goldens.json has logits by model and adapter, as PEFT loads the adapter.
"""
import copy, json, pathlib, shutil, sys, tempfile, warnings
import numpy as np, onnx, torch
from onnx import numpy_helper
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from graphs import exported, save, write

warnings.filterwarnings("ignore")
torch.set_num_threads(1)
OUT = pathlib.Path(sys.argv[1])
V, H = 40, 16
IDS = torch.tensor([[3, 9, 7, 11, 39]])
QV = ["q_proj", "v_proj"]
ROWS = [3, 9, 39]


class Plain(LlamaForCausalLM):
    """Without a cache, so that it exports to a graph with one input and one output."""

    def forward(self, input_ids, **_):
        n = input_ids.shape[1]
        places = torch.arange(n)
        mask = torch.where(places[:, None] >= places[None, :], 0.0, -1e9)[None, None].to(self.dtype)
        hidden = self.model(input_ids, mask, places[None], use_cache=False).last_hidden_state
        return self.lm_head(hidden)


def base(tied=True):
    torch.manual_seed(7)
    config = LlamaConfig(vocab_size=V, hidden_size=H, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
                         num_key_value_heads=1, head_dim=8, max_position_embeddings=32, tie_word_embeddings=tied, dtype="float32",
                         attn_implementation="eager", bos_token_id=None, eos_token_id=0, pad_token_id=None)
    model = Plain(config).eval()
    for name, parameter in model.named_parameters():
        if name != "lm_head.weight":
            nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.2)
    if not tied:
        nn.init.normal_(model.lm_head.weight, std=0.2)
    return model


CASES = {
    "rows": dict(trainable_token_indices=ROWS),
    "rows-more": dict(trainable_token_indices=[1, 9]),
    "rows-ensured": dict(trainable_token_indices={"embed_tokens": ROWS}, ensure_weight_tying=True),
    "rows-apart": dict(trainable_token_indices={"embed_tokens": ROWS, "lm_head": [3, 5]}),
    "rows-head": dict(trainable_token_indices={"lm_head": [3, 5]}),
    "rows-lora-head": dict(target_modules=["q_proj", "lm_head"], trainable_token_indices=ROWS),
    "lora-embedding": dict(target_modules=["q_proj", "embed_tokens"]),
    "lora-ensured": dict(target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True),
    "saved-embedding": dict(modules_to_save=["embed_tokens"]),
    "saved-ensured": dict(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "pissa": dict(init_lora_weights="pissa", target_modules=[*QV, "down_proj"], rank_pattern={"v_proj": 3}, use_rslora=True),
    "olora": dict(init_lora_weights="olora", target_modules=[*QV, "down_proj"], alpha_pattern={"v_proj": 5}),
    "pissa-dora": dict(init_lora_weights="pissa", use_dora=True),
}


def adapt(name, how, folder):
    """Saves an adapter as PEFT does, with random values in place of trained ones."""
    adapted = get_peft_model(base(), LoraConfig(task_type="CAUSAL_LM", **{"r": 2, "lora_alpha": 6, "target_modules": QV, **how}))
    draw = torch.Generator().manual_seed(len(name))
    for parameter in adapted.parameters():
        if parameter.requires_grad:  # in place: tied parameters stay one
            parameter.data.add_(torch.randn(parameter.shape, generator=draw) * 0.2)
    with tempfile.TemporaryDirectory() as saved:
        # The base's layers are left out: the vocabulary alone has a size.
        adapted.save_pretrained(saved, save_embedding_layers=False)
        folder.mkdir(parents=True)
        shutil.copyfile(pathlib.Path(saved, "adapter_model.safetensors"), folder / "adapter_model.safetensors")
        config = json.loads(pathlib.Path(saved, "adapter_config.json").read_text())
        config["base_model_name_or_path"] = "tied"
        write(folder / "adapter_config.json", {k: sorted(v) if isinstance(v, list) and k.startswith("target") else v for k, v in config.items()})


@torch.no_grad()
def logits(model):
    return [float(f"{value:.8g}") for value in model.double()(IDS).flatten().tolist()]


def dynamo(module):
    with tempfile.TemporaryDirectory() as made:
        path = pathlib.Path(made, "model.onnx")
        length = torch.export.Dim("sequence", min=2, max=32)
        torch.onnx.export(module, (IDS,), str(path), input_names=["input_ids"], output_names=["logits"], opset_version=18, dynamo=True,
                          external_data=False, verbose=False, dynamic_shapes=({1: length},))
        graph = onnx.load(path)
    for node in graph.graph.node:
        node.doc_string = ""
        keep = [entry for entry in node.metadata_props if entry.key == "pkg.torch.onnx.name_scopes"]
        del node.metadata_props[:]
        node.metadata_props.extend(keep)
    del graph.graph.value_info[:]
    for thing in [graph, graph.graph, *graph.graph.input, *graph.graph.output, *graph.graph.initializer]:
        del thing.metadata_props[:]
    return graph


def torchscript(model):
    return exported(model, (IDS,), {"input_ids": {0: "batch", 1: "sequence"}}, {"logits": {0: "batch", 1: "sequence"}})


def quantised(graph):
    """The head alone in 4 bits."""
    graph = copy.deepcopy(graph)
    others = [node.name for node in graph.graph.node if node.op_type == "MatMul" and "lm_head" not in node.name]
    quantizer = MatMulNBitsQuantizer(graph, block_size=16, is_symmetric=True, nodes_to_exclude=others)
    quantizer.process()
    return quantizer.model.model


def head_of(graph):
    """The weight that the head has in 4 bits."""
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}
    packed, scales = next([tensors[name] for name in node.input[1:3]] for node in graph.graph.node if node.op_type == "MatMulNBits")
    values = np.stack([packed & 15, packed >> 4], -1).reshape(V, -1, 16).astype(np.float64) - 8
    return torch.tensor((values * scales.reshape(V, -1, 1)).reshape(V, H))


@torch.no_grad()
def with_head(head, adapter):
    """What PEFT computes on a tied base, were its head this one: rows of tokens reach both."""
    model = base()
    if adapter:
        model = PeftModel.from_pretrained(model, OUT / "adapters" / adapter).eval().base_model.model
    model = model.double()
    head = head.clone()
    if adapter:
        tokens = model.model.embed_tokens.token_adapter
        head[tokens.token_indices["default"]] = tokens.trainable_tokens_delta["default"].double()
    model.lm_head = nn.Linear(H, V, bias=False)
    model.lm_head.weight = nn.Parameter(head)
    return logits(model)


if __name__ == "__main__":
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as saved:
        base().save_pretrained(saved)
        shutil.copyfile(pathlib.Path(saved, "model.safetensors"), OUT / "base.safetensors")
    script = torchscript(base())
    save(script, OUT / "torchscript.onnx")
    save(torchscript(base(tied=False)), OUT / "untied.onnx")
    packed = quantised(script)
    onnx.save(packed, OUT / "q4.onnx")
    onnx.save(dynamo(base()), OUT / "dynamo.onnx")
    goldens = {"input_ids": IDS[0].tolist(), "vocabulary": V, "tied": {"": logits(base())}, "untied": {"": logits(base(tied=False))}}
    for name, how in CASES.items():
        folder = OUT / "adapters" / name
        adapt(name, how, folder)
        goldens["tied"][name] = logits(PeftModel.from_pretrained(base(), folder).eval())
    goldens["untied"]["rows"] = logits(PeftModel.from_pretrained(base(tied=False), OUT / "adapters/rows").eval())
    goldens["q4"] = {adapter: with_head(head_of(packed), adapter) for adapter in ("", "rows")}
    lines = [f"{json.dumps(k)}: {json.dumps(v, separators=(',', ':'))}" for k, v in goldens.items()]
    (OUT / "goldens.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
