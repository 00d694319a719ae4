"""A tiny random FLAN-T5 (gated feed-forward, untied head) as two files, an encoder and a decoder, and two adapters for it.

encoder.onnx is exported as Optimum does it, the encoder alone: its weights have lost their names, and its nodes lack the "encoder"
in front. decoder.onnx is the whole model fed with the encoder's result. goldens.json is computed by PEFT in f64, without the exported graphs.

usage: python make.py    (torch 2.13, transformers 5, peft 0.21, onnx)
"""
import copy, io, json, pathlib, shutil, tempfile, warnings
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

warnings.filterwarnings("ignore")
torch.set_num_threads(1)
HERE = pathlib.Path(__file__).parent
ROWS = [[5, 9, 13, 21, 1, 0], [33, 2, 40, 8, 17, 1]]
TOKENS = 8
# Greedy decoding must not hang on rounding.
MARGIN = 0.02


class Encoder(nn.Module):
    def __init__(self, encoder):
        super().__init__()
        # The children themselves, so that node names begin with "/block.0".
        for name, child in encoder.named_children():
            self.add_module(name, child)
        self.__dict__["whole"] = encoder

    def forward(self, input_ids, attention_mask):
        return self.__dict__["whole"](input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


class Decoder(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.decoder, self.lm_head = model.decoder, model.lm_head

    def forward(self, input_ids, encoder_hidden_states, encoder_attention_mask):
        hidden = self.decoder(input_ids=input_ids, encoder_hidden_states=encoder_hidden_states,
                              encoder_attention_mask=encoder_attention_mask, use_cache=False).last_hidden_state
        return self.lm_head(hidden)


def base():
    torch.manual_seed(3)
    config = T5Config(vocab_size=48, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_decoder_layers=2, num_heads=4,
                      feed_forward_proj="gated-gelu", tie_word_embeddings=False, dropout_rate=0.0, decoder_start_token_id=0)
    config._attn_implementation = "eager"
    model = T5ForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.2)
    return model


def adapt(model):
    """Both adapters; "titles" brings a head of its own."""
    torch.manual_seed(4)
    how = dict(task_type="SEQ_2_SEQ_LM", r=4, lora_alpha=8, target_modules=["q", "v"])
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(**how), adapter_name="answers")
    adapted.add_adapter("titles", LoraConfig(**how, modules_to_save=["lm_head"]))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
        if "lm_head.modules_to_save" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return adapted.eval()


@torch.no_grad()
def answers(model):
    ids = torch.tensor(ROWS)
    mask = (ids != 0).long()
    encoded = model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
    tokens, lead = torch.zeros(len(ROWS), 1, dtype=torch.long), float("inf")
    for _ in range(TOKENS):
        logits = model(encoder_outputs=(encoded,), attention_mask=mask, decoder_input_ids=tokens, use_cache=False).logits
        best = logits[:, -1].topk(2).values
        lead = min(lead, float((best[:, 0] - best[:, 1]).min()))
        tokens = torch.cat([tokens, logits[:, -1].argmax(-1, keepdim=True)], 1)
    return {"encoded": encoded.flatten().tolist(), "logits": logits.flatten().tolist(), "tokens": tokens.tolist(), "lead": lead}


def export(module, names, inputs, axes, output, path):
    buffer = io.BytesIO()
    torch.onnx.export(module, inputs, buffer, input_names=names, output_names=[output], dynamic_axes=axes,
                      opset_version=17, dynamo=False)
    path.write_bytes(buffer.getvalue())


model = base()
save_file({name: value.contiguous().clone() for name, value in model.state_dict().items()
           if name not in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")}, HERE / "base.safetensors")
adapted = adapt(model)
with tempfile.TemporaryDirectory() as folder:
    adapted.save_pretrained(folder)
    for id in ("answers", "titles"):
        (HERE / "adapters" / id).mkdir(parents=True, exist_ok=True)
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copy(pathlib.Path(folder) / id / file, HERE / "adapters" / id / file)

ids = torch.tensor(ROWS)
mask = (ids != 0).long()
rows = {0: "batch", 1: "length"}
hidden = model.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
export(Encoder(model.encoder), ["input_ids", "attention_mask"], (ids, mask),
       {"input_ids": rows, "attention_mask": rows, "last_hidden_state": rows}, "last_hidden_state", HERE / "encoder.onnx")
written = {0: "batch", 1: "written"}
export(Decoder(model), ["input_ids", "encoder_hidden_states", "encoder_attention_mask"], (ids[:, :3], hidden, mask),
       {"input_ids": written, "encoder_hidden_states": rows, "encoder_attention_mask": rows, "logits": written},
       "logits", HERE / "decoder.onnx")

exact = adapted.double()
goldens = {"rows": ROWS}
with exact.disable_adapter():
    goldens["base"] = answers(exact.get_base_model())
for id in ("answers", "titles"):
    exact.set_adapter(id)
    goldens[id] = answers(exact.get_base_model())
for id, golden in goldens.items():
    if id != "rows":
        assert golden["lead"] > MARGIN, (id, golden["lead"])
rounded = json.loads(json.dumps(goldens), parse_float=lambda text: round(float(text), 9))
(HERE / "goldens.json").write_text(json.dumps(rounded) + "\n")
print({id: (golden["tokens"], round(golden["lead"], 3)) for id, golden in goldens.items() if id != "rows"})
