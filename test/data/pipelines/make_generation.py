"""A tiny random Whisper and a tiny random Marian as local models of transformers.js, two adapters for each, and what they generate.

The graphs are TorchScript's, as Optimum writes them: onnx/encoder_model.onnx is the encoder alone, onnx/decoder_model_merged.onnx the
decoder twice in an If, with and without a cache of keys and values. generations.json is computed by PEFT in f64, without a cache and
without the exported graphs, and equals its `generate` in f32. The text means nothing.

usage: python make_generation.py [whisper] [marian]    (torch 2.13, transformers 5.24, peft 0.21, onnx 1.23, tokenizers 0.23)
"""
import json, pathlib, sys
HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "make"))
from generation import GENERATED, by_task, cached, exports, present, replay, search
from graphs import characters, save_adapters, save_targets, with_adapters, write
import numpy as np, torch
from torch import nn
from transformers import GenerationMixin, MarianConfig, MarianMTModel, WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

LAYERS = 1


class Kind:
    # Greedy decoding must not hang on rounding, nor on how a spectrogram is computed.
    layers, heads, width, margin = LAYERS, 2, 8, 0.03

    def base(self):
        model = self.model().eval()
        model.config._attn_implementation = "eager"
        for name, parameter in model.named_parameters():
            if "embed_positions" in name or parameter.ndim == 1 and "norm" not in name:
                continue
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.6 if "fc" in name else 0.35)
            elif name in ("model.decoder.layer_norm.weight", f"model.decoder.layers.{LAYERS - 1}.final_layer_norm.weight"):
                # The head is the table of tokens: otherwise a token is followed by itself for ever.
                nn.init.normal_(parameter, std=1.5)
        return model

    def adapt(self, model):
        how = dict(task_type="SEQ_2_SEQ_LM" if self.name == "marian" else None, r=2, lora_alpha=4)
        return with_adapters(model, {name: {"target_modules": targets} for name, targets in self.adapters.items()}, std=0.3, **how)

    def sizes(self):
        side = lambda name: {f"{name}_layers": LAYERS, f"{name}_attention_heads": self.heads, f"{name}_ffn_dim": 32}
        return dict(vocab_size=self.tokenizer.get_vocab_size(), d_model=self.heads * self.width, **side("encoder"), **side("decoder"), dropout=0.0)


class Whisper(Kind):
    name = "whisper"
    adapters = {"clinic": ["q_proj", "v_proj"], "court": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]}
    special = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|fr|>", "<|translate|>", "<|transcribe|>", "<|notimestamps|>",
               "<|0.00|>", "<|0.02|>"]
    # Sounds: amplitudes and steps of sines, and the number of samples.
    prompts = {"low": {"waves": [[0.5, 0.11], [0.2, 0.35]], "samples": 24000},
               "high": {"waves": [[0.4, 0.9], [0.3, 1.7]], "samples": 32000}}
    extractor = WhisperFeatureExtractor(feature_size=8, chunk_length=2)
    given = ["input_ids", "encoder_hidden_states"]
    kinds = 4

    def __init__(self):
        self.tokenizer = characters([], more=self.special)
        ids = {token: self.tokenizer.token_to_id(token) for token in self.special}
        self.end = ids["<|endoftext|>"]
        self.prefix = [ids[token] for token in ("<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>")]
        self.forbidden = set(ids.values())
        self.generation = {
            "decoder_start_token_id": ids["<|startoftranscript|>"], "eos_token_id": self.end, "pad_token_id": self.end,
            "is_multilingual": True, "lang_to_id": {token: ids[token] for token in ("<|en|>", "<|fr|>")},
            "task_to_id": {task: ids[f"<|{task}|>"] for task in ("transcribe", "translate")},
            "no_timestamps_token_id": ids["<|notimestamps|>"], "max_length": 32, "begin_suppress_tokens": [self.end],
        }

    def model(self):
        return WhisperForConditionalGeneration(WhisperConfig(
            **self.sizes(), num_mel_bins=8, max_source_positions=100, max_target_positions=32, pad_token_id=self.end, bos_token_id=self.end,
            eos_token_id=self.end, decoder_start_token_id=self.prefix[0]))

    def inputs(self, prompt):
        time = np.arange(prompt["samples"])
        sound = sum(np.float64(amplitude) * np.sin(step * time) for amplitude, step in prompt["waves"]).astype(np.float32)
        return {"input_features": self.extractor(sound, sampling_rate=16000, return_tensors="pt").input_features}

    def example(self):
        return {"input_features": torch.cat([self.inputs(prompt)["input_features"] for prompt in self.prompts.values()])}

    def files(self):
        config = {key: value for key, value in self.extractor.to_dict().items() if key != "mel_filters"}
        write(HERE / "whisper/preprocessor_config.json", config | {"processor_class": "WhisperProcessor"})
        return {"tokenizer_class": "WhisperTokenizer", "bos_token": self.special[0], "eos_token": self.special[0],
                "pad_token": self.special[0], "unk_token": self.special[0], "model_max_length": 32}


class Marian(Kind):
    name = "marian"
    adapters = {"formal": ["q_proj", "v_proj"], "slang": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]}
    special = ["</s>", "<unk>", "<pad>", ">>fra<<", ">>deu<<"]
    prompts = {text: text for text in (">>fra<< The house is small.", "Good night, and thanks for all the fish")}
    given = ["encoder_attention_mask", "input_ids", "encoder_hidden_states"]
    kinds = 3

    def __init__(self):
        self.tokenizer = characters(self.special, "</s>")
        self.end, pad = 0, self.special.index("<pad>")
        self.prefix, self.forbidden = [pad], set(range(len(self.special)))
        # Beams as translators of OPUS ask for; transformers.js takes the best token of each step all the same.
        self.generation = {"decoder_start_token_id": pad, "eos_token_id": 0, "pad_token_id": pad, "bad_words_ids": [[pad]],
                           "num_beams": 4, "max_length": 64}

    def model(self):
        return MarianMTModel(MarianConfig(
            **self.sizes(), max_position_embeddings=64, pad_token_id=self.prefix[0], eos_token_id=0, decoder_start_token_id=self.prefix[0],
            forced_eos_token_id=None, scale_embedding=True, activation_function="swish"))

    def inputs(self, prompt):
        ids = torch.tensor([self.tokenizer.encode(prompt).ids])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def example(self):
        ids = torch.tensor([[3, 9, 13, 21, 0, 2], [33, 12, 40, 8, 17, 0]])
        return {"input_ids": ids, "attention_mask": (ids != 2).long()}

    def files(self):
        return {"tokenizer_class": "MarianTokenizer", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>",
                "model_max_length": 64}


class Inner(nn.Module):
    def __init__(self, decoder):
        super().__init__()
        self.decoder = decoder

    def forward(self, **given):
        return self.decoder(**given).last_hidden_state


class Decoder(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = Inner(model.model.decoder)
        self.masked = hasattr(model, "lm_head")
        if self.masked:
            self.lm_head = model.lm_head
        else:
            self.proj_out = model.proj_out

    def forward(self, input_ids, hidden, *rest):
        mask, past = (rest[0], rest[1:]) if self.masked else (None, rest)
        cache, reached, places = cached(input_ids, past)
        given = {"encoder_attention_mask": torch.where(mask.bool(), 0.0, -1e9)[:, None, None, :]} if self.masked else {
            "position_ids": torch.arange(*places)[None]}
        hidden = self.model(input_ids=input_ids, attention_mask=torch.where(reached, 0.0, -1e9)[None, None], cache=cache, use_cache=True,
                            encoder_hidden_states=hidden, **given)
        return (self.lm_head if self.masked else self.proj_out)(hidden), *present(cache)


@torch.no_grad()
def check_generate(kind, adapted, found):
    """PEFT's own `generate` in f32 finds the same tokens."""
    for task, model in by_task(kind, adapted):
        for name, prompt in kind.prompts.items():
            expected = next(run["ids"] for run in found if run["task"] == task and run["prompt"] == name)
            start = {} if kind.name == "marian" else {"decoder_input_ids": torch.tensor([kind.prefix])}
            ids = GenerationMixin.generate(model, **kind.inputs(prompt), **start, max_new_tokens=GENERATED, do_sample=False, num_beams=1)
            assert ids[0].tolist()[-GENERATED:] == expected, (task, name)


def make(kind):
    folder = HERE / kind.name
    seed, model, adapted, found = search(kind)
    check_generate(kind, adapted, found)
    exports(kind, model.model.encoder, Decoder(model), folder)
    for run in found:
        if run["task"] == "base":
            replay(kind, run, folder)
    save_targets(model, adapted, folder / "base.safetensors")
    save_adapters(adapted, kind.adapters, folder / "adapters")
    kind.tokenizer.save(str(folder / "tokenizer.json"))
    write(folder / "tokenizer_config.json", kind.files() | {"clean_up_tokenization_spaces": False})
    write(folder / "config.json", {**model.config.to_diff_dict(), "architectures": [type(model).__name__], "is_encoder_decoder": True})
    write(folder / "generation_config.json", kind.generation | {"do_sample": False})
    logits = lambda run: {"logits": [round(value, 5) for value in run["logits"]]} if kind.name == "marian" else {}
    lines = [json.dumps({"task": run["task"], "prompt": kind.prompts[run["prompt"]], "ids": run["ids"], "lead": round(run["lead"], 4),
                         **logits(run)}) for run in found]
    (folder / "generations.json").write_text("[\n" + ",\n".join(lines) + "\n]\n")
    print(f"{kind.name}, seeds {seed}: smallest lead {min(run['lead'] for run in found):.3f}")
    for run in found:
        print(run["task"], repr(run["prompt"]), repr(kind.tokenizer.decode(run["ids"])))


for kind in (Whisper, Marian):
    if len(sys.argv) < 2 or kind.name in sys.argv:
        make(kind())
