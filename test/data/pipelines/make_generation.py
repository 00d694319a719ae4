"""A tiny random Whisper and a tiny random Marian as local models of transformers.js, two adapters for each, and what they generate.

The graphs are TorchScript's, as Optimum writes them: onnx/encoder_model.onnx is the encoder alone, onnx/decoder_model_merged.onnx the
decoder twice in an If, with and without a cache of keys and values. generations.json is computed by PEFT in f64, without a cache and
without the exported graphs, and equals its `generate` in f32. The text means nothing.

usage: python make_generation.py [whisper] [marian]    (torch 2.13, transformers 5.24, peft 0.21, onnx 1.23, tokenizers 0.23)
"""
import copy, itertools, json, pathlib, sys, warnings
import numpy as np, torch
from onnx.reference import ReferenceEvaluator
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers import (DynamicCache, EncoderDecoderCache, GenerationMixin, MarianConfig, MarianMTModel, WhisperConfig,
                          WhisperFeatureExtractor, WhisperForConditionalGeneration)

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "make"))
from graphs import axes, characters, exported, merged, save, save_adapters, write

warnings.filterwarnings("ignore")
torch.set_num_threads(1)
GENERATED = 12
# Greedy decoding must not hang on rounding, nor on how a spectrogram is computed.
MARGIN = 0.03
HEADS, WIDTH, LAYERS = 2, 8, 1
HIDDEN = HEADS * WIDTH
SIDES = [f"{layer}.{half}.{side}" for layer in range(LAYERS) for half in ("decoder", "encoder") for side in ("key", "value")]


class Whisper:
    name = "whisper"
    adapters = {"clinic": ["q_proj", "v_proj"], "court": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]}
    special = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|fr|>", "<|translate|>", "<|transcribe|>", "<|notimestamps|>",
               "<|0.00|>", "<|0.02|>"]
    # Sounds: amplitudes and steps of sines, and the number of samples.
    prompts = {"low": {"waves": [[0.5, 0.11], [0.2, 0.35]], "samples": 24000},
               "high": {"waves": [[0.4, 0.9], [0.3, 1.7]], "samples": 32000}}
    extractor = WhisperFeatureExtractor(feature_size=8, chunk_length=2)
    # Inputs of the decoder, before the cache.
    given = ["input_ids", "encoder_hidden_states"]
    # Different tokens that a text must have.
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
            vocab_size=self.tokenizer.get_vocab_size(), num_mel_bins=8, d_model=HIDDEN, encoder_layers=LAYERS, decoder_layers=LAYERS,
            encoder_attention_heads=HEADS, decoder_attention_heads=HEADS, encoder_ffn_dim=32, decoder_ffn_dim=32,
            max_source_positions=100, max_target_positions=32, pad_token_id=self.end, bos_token_id=self.end, eos_token_id=self.end,
            decoder_start_token_id=self.prefix[0], dropout=0.0))

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


class Marian:
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
            vocab_size=self.tokenizer.get_vocab_size(), d_model=HIDDEN, encoder_layers=LAYERS, decoder_layers=LAYERS,
            encoder_attention_heads=HEADS, decoder_attention_heads=HEADS, encoder_ffn_dim=32, decoder_ffn_dim=32,
            max_position_embeddings=64, pad_token_id=self.prefix[0], eos_token_id=0, decoder_start_token_id=self.prefix[0],
            forced_eos_token_id=None, scale_embedding=True, activation_function="swish", dropout=0.0))

    def inputs(self, prompt):
        ids = torch.tensor([self.tokenizer.encode(prompt).ids])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def example(self):
        ids = torch.tensor([[3, 9, 13, 21, 0, 2], [33, 12, 40, 8, 17, 0]])
        return {"input_ids": ids, "attention_mask": (ids != 2).long()}

    def files(self):
        return {"tokenizer_class": "MarianTokenizer", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>",
                "model_max_length": 64}


class Encoder(nn.Module):
    def __init__(self, encoder):
        super().__init__()
        # The children themselves, so that node names begin with "/layers.0".
        for name, child in encoder.named_children():
            self.add_module(name, child)
        self.__dict__["whole"] = encoder

    def forward(self, *given):
        return self.__dict__["whole"](*given).last_hidden_state


class Inner(nn.Module):
    def __init__(self, decoder):
        super().__init__()
        self.decoder = decoder

    def forward(self, **given):
        return self.decoder(**given).last_hidden_state


class Decoder(nn.Module):
    """Flat tensors in, flat tensors out, in the order of SIDES; without a past, the first run."""

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
        own, across = DynamicCache(), DynamicCache()
        for layer in range(len(past) // 4):
            own.update(past[4 * layer], past[4 * layer + 1], layer)
            across.update(past[4 * layer + 2], past[4 * layer + 3], layer)
        new = input_ids.shape[1]
        total = past[0].shape[2] + new if past else new
        reached = torch.arange(total - new, total)[:, None] >= torch.arange(total)[None, :]
        given = {"encoder_attention_mask": torch.where(mask.bool(), 0.0, -1e9)[:, None, None, :]} if self.masked else {
            "position_ids": torch.arange(total - new, total)[None]}
        hidden = self.model(input_ids=input_ids, attention_mask=torch.where(reached, 0.0, -1e9)[None, None],
                            cache=EncoderDecoderCache(own, across), use_cache=True, encoder_hidden_states=hidden, **given)
        present = [side for layers in zip(own.layers, across.layers) for layer in layers for side in (layer.keys, layer.values)]
        return (self.lm_head if self.masked else self.proj_out)(hidden), *present


def base(kind, seed):
    torch.manual_seed(seed)
    model = kind.model().eval()
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


def adapt(kind, model):
    (first, targets), *others = kind.adapters.items()
    how = dict(task_type="SEQ_2_SEQ_LM" if kind.name == "marian" else None, r=2, lora_alpha=4)
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(**how, target_modules=targets), adapter_name=first)
    for name, targets in others:
        adapted.add_adapter(name, LoraConfig(**how, target_modules=targets))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    return adapted.eval()


@torch.no_grad()
def greedy(kind, model, inputs):
    """Greedy tokens, the logits that chose the first, and the smallest lead of a chosen token."""
    inputs = {key: value.to(model.dtype) if value.is_floating_point() else value for key, value in inputs.items()}
    encoded = model.get_encoder()(**inputs).last_hidden_state
    mask = {"attention_mask": inputs["attention_mask"]} if "attention_mask" in inputs else {}
    tokens, lead, first = torch.tensor([kind.prefix]), float("inf"), None
    for _ in range(GENERATED):
        logits = model(encoder_outputs=(encoded,), **mask, decoder_input_ids=tokens, use_cache=False).logits[:, -1]
        first = logits if first is None else first
        best = logits.topk(2).values[0]
        lead = min(lead, float(best[0] - best[1]))
        if lead < MARGIN:
            break
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], 1)
    return {"ids": tokens[0].tolist()[len(kind.prefix):], "lead": lead, "logits": first[0].tolist()}


def by_task(kind, adapted):
    """The model of each task in turn."""
    with adapted.disable_adapter():
        yield "base", adapted.get_base_model()
    for task in kind.adapters:
        adapted.set_adapter(task)
        yield task, adapted.get_base_model()


def generations(kind, adapted):
    for task, model in by_task(kind, adapted):
        for name, prompt in kind.prompts.items():
            yield {"task": task, "prompt": name, **greedy(kind, model, kind.inputs(prompt))}


def usable(kind, run):
    """Clear choices, nothing special, no stuck repetition."""
    ids = run["ids"]
    return run["lead"] >= MARGIN and not kind.forbidden & set(ids) and len(ids) == GENERATED and len(set(ids)) >= kind.kinds


def search(kind):
    """The first seeds whose runs are all usable, and whose tasks differ from the first tokens on."""
    for seed in itertools.count():
        model = base(kind, seed)
        plain = copy.deepcopy(model).double()
        if not all(usable(kind, greedy(kind, plain, kind.inputs(prompt))) for prompt in kind.prompts.values()):
            continue
        for second in range(200):
            torch.manual_seed(second)
            adapted = adapt(kind, model)
            found = list(itertools.takewhile(lambda run: usable(kind, run), generations(kind, copy.deepcopy(adapted).double())))
            if len({(run["prompt"], *run["ids"][:3]) for run in found}) == 3 * len(kind.prompts):
                return (seed, second), model, adapted, found


@torch.no_grad()
def check_generate(kind, adapted, found):
    """PEFT's own `generate` in f32 finds the same tokens."""
    for task, model in by_task(kind, adapted):
        for name, prompt in kind.prompts.items():
            expected = next(run["ids"] for run in found if run["task"] == task and run["prompt"] == name)
            start = {} if kind.name == "marian" else {"decoder_input_ids": torch.tensor([kind.prefix])}
            ids = GenerationMixin.generate(model, **kind.inputs(prompt), **start, max_new_tokens=GENERATED, do_sample=False, num_beams=1)
            assert ids[0].tolist()[-GENERATED:] == expected, (task, name)


def shape(kind):
    def of(when, name):
        if name == "logits":
            return ["batch_size", "decoder_sequence_length", kind.tokenizer.get_vocab_size()]
        if name == "encoder_hidden_states":
            return ["batch_size", "encoder_sequence_length", HIDDEN]
        if name.endswith(("ids", "mask")):
            return ["batch_size", f"{'en' if 'encoder' in name else 'de'}coder_sequence_length"]
        length = "encoder_sequence_length_out" if ".encoder." in name else f"{when}_decoder_sequence_length"
        return ["batch_size", HEADS, length, WIDTH]
    return of


def exports(kind, model, folder):
    example = kind.example()
    hidden = model.model.encoder(**example).last_hidden_state
    rows, written = axes("batch", "length"), axes("batch", "written")
    save(exported(Encoder(model.model.encoder), tuple(example.values()), {name: axes("batch") if "features" in name else rows for name in example},
                  {"last_hidden_state": rows}), folder / "onnx/encoder_model.onnx")
    masks = [example["attention_mask"]] if "attention_mask" in example else []
    given = {"encoder_hidden_states": rows, **({"encoder_attention_mask": rows} if masks else {})}
    cache = lambda kind, own: {f"{kind}.{side}": {0: "batch", 2: "length" if ".encoder." in side else own} for side in SIDES}
    kept = [torch.randn(2, HEADS, hidden.shape[1] if ".encoder." in side else 5, WIDTH) for side in SIDES]
    ids, present = torch.tensor([[5, 9, 13], [33, 8, 40]]), cache("present", "total")
    first = exported(Decoder(model), (ids, hidden, *masks), {"input_ids": written, **given}, {"logits": written, **present})
    later = exported(Decoder(model), (ids[:, :1], hidden, *masks, *kept), {"input_ids": written, **given, **cache("past_key_values", "past")},
                     {"logits": written, **present})
    save(merged(first, later, kind.given, SIDES, shape(kind)), folder / "onnx/decoder_model_merged.onnx")


def replay(kind, run, folder):
    """Generates with the exported graphs and the cache, by onnx's reference implementation."""
    encoder, decoder = (ReferenceEvaluator(str(folder / f"onnx/{name}.onnx")) for name in ("encoder_model", "decoder_model_merged"))
    inputs = {name: value.numpy() for name, value in kind.inputs(kind.prompts[run["prompt"]]).items()}
    (hidden,) = encoder.run(None, inputs)
    mask = {"encoder_attention_mask": inputs["attention_mask"]} if "attention_mask" in inputs else {}
    past, given, found = [np.zeros((1, HEADS, 0, WIDTH), np.float32)] * len(SIDES), kind.prefix, []
    for step in range(GENERATED):
        feeds = {"input_ids": np.array([given]), "encoder_hidden_states": hidden, **mask, "use_cache_branch": np.array([step > 0])}
        logits, *past = decoder.run(None, feeds | {f"past_key_values.{side}": one for side, one in zip(SIDES, past)})
        if step == 0:
            assert np.abs(logits[0, -1] - run["logits"]).max() < 1e-4
        given = [int(logits[0, -1].argmax())]
        found += given
    assert found == run["ids"], (found, run["ids"])


def make(kind):
    folder = HERE / kind.name
    seed, model, adapted, found = search(kind)
    check_generate(kind, adapted, found)
    exports(kind, model, folder)
    for run in found:
        if run["task"] == "base":
            replay(kind, run, folder)
    targets = {name.removesuffix(".lora_A").removeprefix("base_model.model.") for name, _ in adapted.named_modules() if name.endswith(".lora_A")}
    # Only the weights that are adapted: fingerprints need no others.
    save_file({f"{name}.weight": model.get_submodule(name).weight.detach().clone() for name in sorted(targets)}, folder / "base.safetensors")
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
