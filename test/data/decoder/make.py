"""A tiny random decoder as transformers.js loads it, two adapters for it, and what they generate.

The folder is a local model of transformers.js: config, tokenizer, ONNX with its key-value cache as inputs and outputs,
named as Optimum names them. The graph is TorchScript's, so that weights lose their names and nodes keep module paths.
goldens.json is computed by PyTorch and PEFT in f64, without cache and exported graph. Its text means nothing.

usage: python make.py    (torch 2.13, transformers 5.24, peft 0.21, onnx 1.23, tokenizers 0.23)
"""
import copy, itertools, json, pathlib, sys
HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "make"))
from graphs import characters, exported, save, save_adapters, with_adapters, write
import numpy as np, torch
from onnx.reference import ReferenceEvaluator
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

END = "<|end|>"
PROMPTS = ["Once upon a time", "x = 3;", "The quick brown fox jumps over the lazy dog."]
ADAPTERS = ["upper", "lower"]
TOKENS = 12
# Greedy decoding must not hang on rounding: packs store f16, runtimes add up in f32.
MARGIN = 0.02


class Decoder(LlamaForCausalLM):
    """With the signature of the ONNX file: flat tensors in, flat tensors out."""

    def forward(self, input_ids, attention_mask, position_ids, *past):
        cache = DynamicCache()
        for layer in range(self.config.num_hidden_layers):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        total, new = attention_mask.shape[1], input_ids.shape[1]
        reached = torch.arange(total - new, total)[:, None] >= torch.arange(total)[None, :]
        seen = reached[None, None] & attention_mask.bool()[:, None, None, :]
        # A large finite number: a row of padding sees nothing, and the softmax of -inf alone is NaN.
        mask = torch.where(seen, 0.0, -1e9)
        hidden = self.model(input_ids, mask, position_ids, cache=cache, use_cache=True).last_hidden_state
        present = [side for layer in cache.layers for side in (layer.keys, layer.values)]
        return self.lm_head(hidden), *present


def base(seed, vocabulary):
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=128,
                         tie_word_embeddings=False, bos_token_id=None, eos_token_id=0, pad_token_id=0,
                         attn_implementation="eager", dtype="float32")
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        # Norms around one, so that their scales matter too.
        nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.2)
    return model


@torch.no_grad()
def generate(model, prompt):
    """Greedy continuation, the logits that chose its first token, and the smallest lead of a chosen token."""
    ids, first, lead = list(prompt), None, float("inf")
    for _ in range(TOKENS):
        logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
        first = logits if first is None else first
        best = logits.topk(2)
        lead = min(lead, float(best.values[0] - best.values[1]))
        ids.append(int(best.indices[0]))
    return ids[len(prompt):], first, lead


def runs(adapted, prompts):
    for task, (text, prompt) in itertools.product(["base", *ADAPTERS], prompts.items()):
        if task == "base":
            with adapted.disable_adapter():
                ids, logits, lead = generate(adapted, prompt)
        else:
            adapted.set_adapter(task)
            ids, logits, lead = generate(adapted, prompt)
        yield {"task": task, "prompt": text, "promptIds": prompt, "ids": ids, "lead": lead, "logits": logits.tolist()}


def usable(run):
    """Clear choices, no end token, no stuck repetition."""
    return run["lead"] >= MARGIN and 0 not in run["ids"] and len(set(run["ids"])) >= TOKENS // 2


def search(prompts):
    """The first seed whose runs are all usable, and whose tasks differ from the first tokens on."""
    for seed in itertools.count():
        model = base(seed, made.get_vocab_size())
        adapted = with_adapters(model, dict.fromkeys(ADAPTERS, {}), task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
        found = list(itertools.takewhile(usable, runs(copy.deepcopy(adapted).double(), prompts)))
        starts = {(run["prompt"], *run["ids"][:3]) for run in found}
        if len(starts) == 3 * len(PROMPTS):
            return seed, model, adapted, found


def export(model, path):
    decoder = Decoder(model.config).eval()
    decoder.load_state_dict(model.state_dict())
    sides = [f"{layer}.{side}" for layer in range(model.config.num_hidden_layers) for side in ("key", "value")]
    tokens = {0: "batch_size", 1: "sequence_length"}
    inputs = {"input_ids": tokens, "attention_mask": {0: "batch_size", 1: "total_sequence_length"}, "position_ids": tokens,
              **{f"past_key_values.{side}": {0: "batch_size", 2: "past_sequence_length"} for side in sides}}
    outputs = {"logits": tokens, **{f"present.{side}": {0: "batch_size", 2: "total_sequence_length"} for side in sides}}
    ids = torch.randint(1, model.config.vocab_size, (2, 3))
    past = [torch.randn(2, 2, 5, 8) for _ in sides]
    feeds = (ids, torch.ones(2, 8, dtype=torch.int64), torch.arange(5, 8).repeat(2, 1), *past)
    save(exported(decoder, feeds, inputs, outputs), path)


def replay(path, run):
    """Generates with the exported graph and its cache, by onnx's reference implementation."""
    graph = ReferenceEvaluator(str(path))
    past = [np.zeros((1, 2, 0, 8), np.float32)] * 4
    names = [name for name in graph.input_names if name.startswith("past")]
    ids, given, first = [], run["promptIds"], None
    for _ in range(TOKENS):
        seen = past[0].shape[2]
        feeds = {"input_ids": np.array([given]), "attention_mask": np.ones((1, seen + len(given)), np.int64),
                 "position_ids": np.arange(seen, seen + len(given))[None], **dict(zip(names, past))}
        logits, *past = graph.run(None, feeds)
        first = logits[0, -1] if first is None else first
        given = [int(logits[0, -1].argmax())]
        ids += given
    assert ids == run["ids"], (ids, run["ids"])
    assert np.abs(first - run["logits"]).max() < 1e-4


made = characters([END])
prompts = {text: made.encode(text).ids for text in PROMPTS}
seed, model, adapted, found = search(prompts)
assert [run["ids"] for run in runs(adapted, prompts)] == [run["ids"] for run in found], "f32 chooses other tokens"

export(model, HERE / "onnx/model.onnx")
for run in found:
    if run["task"] == "base":
        replay(HERE / "onnx/model.onnx", run)

made.save(str(HERE / "tokenizer.json"))
write(HERE / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": END,
                                       "model_max_length": 128, "clean_up_tokenization_spaces": False})
write(HERE / "config.json", {**model.config.to_diff_dict(), "architectures": ["LlamaForCausalLM"]})
write(HERE / "generation_config.json", {"eos_token_id": 0, "pad_token_id": 0, "do_sample": False})

save_adapters(adapted, ADAPTERS, HERE / "adapters", base_model_name_or_path="decoder")
lines = [json.dumps(run | {"lead": round(run["lead"], 4), "logits": [round(value, 6) for value in run["logits"]]}) for run in found]
(HERE / "goldens.json").write_text("[\n" + ",\n".join(lines) + "\n]\n")
print(f"seed {seed}: smallest lead {min(run['lead'] for run in found):.3f}")
for run in found:
    print(run["task"], repr(run["prompt"]), repr(made.decode(run["ids"])))
