"""A tiny random FLAN-T5 (gated feed-forward, untied head) as a local model of transformers.js, two adapters for it, and what they answer.

The graphs are TorchScript's, as Optimum writes them. onnx/encoder_model.onnx is the encoder alone: its weights have lost their names,
and its nodes lack the "encoder" in front. onnx/decoder_model_merged.onnx has the decoder twice in an If, with and without a cache of
keys and values, and every weight once. decoder.onnx is the decoder without a cache. goldens.json and generations.json are computed by
PEFT in f64, without a cache and without the exported graphs. Its text means nothing.

usage: python make.py    (torch 2.13, transformers 5.24, peft 0.21, onnx 1.23, tokenizers 0.23)
"""
import copy, json, pathlib, sys
HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "make"))
from generation import GENERATED, by_task, cached, exports, generations, greedy, present, replay, search
from graphs import axes, characters, exported, gradients_of, save, save_adapters, with_adapters, write, write_rounded
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

PAD, END = "<|pad|>", "<|end|>"
ROWS = [[5, 9, 13, 21, 1, 0], [33, 2, 40, 8, 17, 1]]
PROMPTS = ["Summarise: a cat sat.", "What is 2 + 2?", "Translate to French: the house is small, and the tree is tall."]
TOKENS = 8
# f32 by itself must not be far from f64 either: part of the largest logit.
ROUNDING = 4e-6


def feeds(rows):
    ids = torch.tensor(rows)
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


class Flan:
    layers, heads, width = 2, 4, 8
    tokenizer = characters([PAD, END], END)
    adapters, prompts = ["answers", "titles"], {text: text for text in PROMPTS}
    given = ["encoder_attention_mask", "input_ids", "encoder_hidden_states"]
    # Greedy decoding must not hang on rounding.
    prefix, margin, forbidden, kinds = [0], 0.02, {0, 1}, GENERATED // 3

    def inputs(self, prompt):
        return feeds([self.tokenizer.encode(prompt).ids])

    def example(self):
        return feeds(ROWS)

    def base(self):
        config = T5Config(vocab_size=self.tokenizer.get_vocab_size(), d_model=32, d_kv=self.width, d_ff=64, num_layers=self.layers,
                          num_decoder_layers=self.layers, num_heads=self.heads, feed_forward_proj="gated-gelu", tie_word_embeddings=False,
                          dropout_rate=0.0, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0)
        config._attn_implementation = "eager"
        model = T5ForConditionalGeneration(config).eval()
        for name, parameter in model.named_parameters():
            # Layers with large weights, compared with the embeddings: otherwise a token is followed by itself for ever.
            std = 0.6 if "Dense" in name or name == "lm_head.weight" else 0.2
            nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=std)
        return model

    def adapt(self, model):
        """Both adapters; "titles" brings a head of its own."""
        heads = {"answers": {}, "titles": {"modules_to_save": ["lm_head"]}}
        return with_adapters(model, heads, task_type="SEQ_2_SEQ_LM", r=4, lora_alpha=8, target_modules=["q", "v"])


class Decoder(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.decoder, self.lm_head = model.decoder, model.lm_head

    def forward(self, input_ids, encoder_hidden_states, encoder_attention_mask):
        hidden = self.decoder(input_ids=input_ids, encoder_hidden_states=encoder_hidden_states,
                              encoder_attention_mask=encoder_attention_mask, use_cache=False).last_hidden_state
        return self.lm_head(hidden)


class CachedDecoder(Decoder):
    def forward(self, input_ids, encoder_hidden_states, encoder_attention_mask, *past):
        cache, reached, _ = cached(input_ids, past)
        hidden = self.decoder(input_ids=input_ids, attention_mask=torch.where(reached, 0.0, -1e9)[None, None], cache=cache, use_cache=True,
                              encoder_hidden_states=encoder_hidden_states,
                              encoder_attention_mask=torch.where(encoder_attention_mask.bool(), 0.0, -1e9)[:, None, None, :]).last_hidden_state
        return self.lm_head(hidden), *present(cache)


def steady(model, exact, share):
    """Clear choices by f64, the same in f32, whose numbers are off by less than a part of the largest."""
    golden, found = (greedy(kind, one, feeds(ROWS), TOKENS) for one in (exact, model))
    return golden["lead"] >= kind.margin and found["tokens"] == golden["tokens"] and all(
        (found[key] - golden[key]).abs().max() / golden[key].abs().max() < ROUNDING / share for key in ("encoded", "logits"))


kind = Flan()
seed, model, adapted, found = search(kind, steady)
exact = copy.deepcopy(adapted).double()
goldens = {task: greedy(kind, one, feeds(ROWS), TOKENS) for task, one in by_task(kind, exact)}
assert [run["ids"] for run in generations(kind, adapted)] == [run["ids"] for run in found], "f32 chooses other tokens"

save_file({name: value.contiguous().clone() for name, value in model.state_dict().items()
           if name not in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")}, HERE / "base.safetensors")
ids, mask = feeds(ROWS).values()
rows, written = axes("batch", "length"), axes("batch", "written")
hidden = model.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
save(exported(Decoder(model), (ids[:, :3], hidden, mask), {"input_ids": written, "encoder_hidden_states": rows, "encoder_attention_mask": rows},
              {"logits": written}), HERE / "decoder.onnx")
exports(kind, model.encoder, CachedDecoder(model), HERE)
for run in found:
    if run["task"] == "base":
        replay(kind, run, HERE)

kind.tokenizer.save(str(HERE / "tokenizer.json"))
write(HERE / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": PAD,
                                       "model_max_length": 128, "clean_up_tokenization_spaces": False})
write(HERE / "config.json", {**model.config.to_diff_dict(), "architectures": ["T5ForConditionalGeneration"],
                             "is_encoder_decoder": True})
write(HERE / "generation_config.json", {"decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0, "do_sample": False})

save_adapters(adapted, kind.adapters, HERE / "adapters")

flat = {task: {key: value.flatten().tolist() if torch.is_tensor(value) else value for key, value in golden.items()}
        for task, golden in goldens.items()}
write_rounded(HERE / "goldens.json", {"rows": ROWS, **flat})
exact.set_adapter("answers")
read = torch.tensor(goldens["answers"]["tokens"])[:, :-1]
given = exact(**feeds(ROWS), decoder_input_ids=read, use_cache=False)
save_file(gradients_of(exact, given.logits, "answers", 97), HERE / "gradients.safetensors")
lines = [json.dumps({"task": run["task"], "prompt": run["prompt"], "promptIds": kind.tokenizer.encode(run["prompt"]).ids, "ids": run["ids"],
                     "lead": round(run["lead"], 4), "logits": [round(value, 6) for value in run["logits"]]}) for run in found]
(HERE / "generations.json").write_text("[\n" + ",\n".join(lines) + "\n]\n")
leads = [one["lead"] for one in [*found, *goldens.values()]]
print(f"seeds {seed}: smallest lead {min(leads):.3f}")
for run in found:
    print(run["task"], repr(run["prompt"]), repr(kind.tokenizer.decode(run["ids"])))
