"""Tiny configurations of the families that people ship, by transformers' and diffusers' own classes."""
import dataclasses
from typing import Callable
import torch
import transformers as hf
from transformers.modeling_outputs import BaseModelOutput

BATCH, LENGTH, VOCABULARY = 3, 7, 96
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": VOCABULARY}
DECODER = SMALL | {"num_key_value_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@dataclasses.dataclass
class Part:
    """What becomes one ONNX file."""
    call: Callable
    feeds: Callable
    axes: dict
    output: str = "logits"
    # Path of the module that is exported; "" is the model itself. And what of it is called.
    module: str = ""
    method: str = "forward"
    # True if torch.export finds the free dimensions itself.
    automatic: bool = False


@dataclasses.dataclass
class Family:
    name: str
    title: str
    build: Callable
    parts: dict
    adapters: dict
    exporters: tuple = ("torchscript", "dynamo")
    formats: dict = dataclasses.field(default_factory=dict)
    gain: float = 0.8
    seed: int = 1
    attention: str | None = "eager"


FAMILIES: dict[str, Family] = {}
ALL_FORMATS = {"torchscript": ("f16", "q4", "int8")}


def family(name, title, build, parts, a, b, **more):
    parts = parts if isinstance(parts, dict) else {"model": parts}
    FAMILIES[name] = Family(name, title, build, parts, {"a": a, "b": b}, **more)


# ---- feeds

def ids(seed=3, length=LENGTH, rows=BATCH):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, VOCABULARY, (rows, length), generator=generator)


def mask():
    """The second row is two tokens shorter, padded at its end."""
    made = torch.ones(BATCH, LENGTH, dtype=torch.int64)
    made[1, -2:] = 0
    return made


def numbers(*shape, seed=4):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


ROWS = {0: "batch", 1: "sequence"}


def text(output=lambda result: result.logits, kinds=False, name="logits", **more):
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if kinds else [])]

    def feeds():
        made = {"input_ids": ids(), "attention_mask": mask()}
        if kinds:
            made["token_type_ids"] = torch.tensor([[0] * 4 + [1] * 3] * BATCH)
        return made
    return Part(lambda run, given: output(run(**given)), feeds, {one: ROWS for one in names}, output=name, **more)


def causal(**more):
    return text_with(lambda run, given: run(**given, use_cache=False).logits, **more)


def text_with(call, **more):
    part = text(**more)
    part.call = call
    return part


def image(output, size=32, channels=3, name="logits", key="pixel_values", **more):
    return Part(lambda run, given: output(run(**given)), lambda: {key: numbers(BATCH, channels, size, size)}, {key: {0: "batch"}},
                output=name, **more)


# ---- decoders

ATTENTION = {"target_modules": ["q_proj", "v_proj"]}
EVERYTHING = {"target_modules": "all-linear"}
FEW_FORMATS = {"torchscript": ("q4",)}


def lm(name, title, kind, config, a=ATTENTION, b=EVERYTHING, **more):
    family(name, title, lambda: kind(config()), causal(), a, b, **more)


lm("llama", "Llama", hf.LlamaForCausalLM, lambda: hf.LlamaConfig(**DECODER), formats=ALL_FORMATS | {"dynamo": ("q4", "int8")})
lm("mistral", "Mistral", hf.MistralForCausalLM, lambda: hf.MistralConfig(**DECODER, sliding_window=4, head_dim=8),
   b=EVERYTHING | {"use_dora": True})
lm("qwen2", "Qwen2", hf.Qwen2ForCausalLM, lambda: hf.Qwen2Config(**DECODER), b=EVERYTHING | {"use_rslora": True}, formats=ALL_FORMATS)
lm("qwen3", "Qwen3", hf.Qwen3ForCausalLM, lambda: hf.Qwen3Config(**DECODER, head_dim=8), formats=FEW_FORMATS)
lm("gemma2", "Gemma 2", hf.Gemma2ForCausalLM, lambda: hf.Gemma2Config(**DECODER, head_dim=8, sliding_window=4), formats=FEW_FORMATS)
lm("gemma3", "Gemma 3", hf.Gemma3ForCausalLM,
   lambda: hf.Gemma3TextConfig(**DECODER, head_dim=8, sliding_window=4, layer_types=["sliding_attention", "full_attention"]),
   formats=FEW_FORMATS)
lm("phi3", "Phi-3", hf.Phi3ForCausalLM, lambda: hf.Phi3Config(**DECODER), {"target_modules": ["qkv_proj"]}, formats=FEW_FORMATS)
lm("smollm3", "SmolLM3", hf.SmolLM3ForCausalLM, lambda: hf.SmolLM3Config(**DECODER), formats=FEW_FORMATS)
lm("olmo2", "OLMo 2", hf.Olmo2ForCausalLM, lambda: hf.Olmo2Config(**DECODER))
lm("granite", "Granite", hf.GraniteForCausalLM, lambda: hf.GraniteConfig(**DECODER, logits_scaling=2.0, residual_multiplier=0.8))
lm("stablelm", "StableLM", hf.StableLmForCausalLM, lambda: hf.StableLmConfig(**DECODER))
lm("gpt2", "GPT-2", hf.GPT2LMHeadModel,
   lambda: hf.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=32),
   {"target_modules": ["c_attn"], "fan_in_fan_out": True},
   {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}, formats={"torchscript": ("f16",)})
lm("gpt-neox", "GPT-NeoX, Pythia", hf.GPTNeoXForCausalLM, lambda: hf.GPTNeoXConfig(**SMALL, max_position_embeddings=32),
   {"target_modules": ["query_key_value"]}, formats=FEW_FORMATS)
lm("opt", "OPT", hf.OPTForCausalLM,
   lambda: hf.OPTConfig(vocab_size=VOCABULARY, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
                        max_position_embeddings=32, word_embed_proj_dim=32, dropout=0.0))
lm("bloom", "BLOOM", hf.BloomForCausalLM, lambda: hf.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4),
   {"target_modules": ["query_key_value"]})
lm("falcon", "Falcon", hf.FalconForCausalLM,
   lambda: hf.FalconConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
   {"target_modules": ["query_key_value"]})


def cached(width=8, heads=2, layers=2, past=5):
    """As Optimum exports a decoder for text generation: two tokens more, behind a cache of five."""
    sides = [f"past_key_values_{layer}_{side}" for layer in range(layers) for side in ("key", "value")]

    def call(run, given):
        cache = hf.DynamicCache()
        for layer in range(layers):
            cache.update(given[sides[2 * layer]], given[sides[2 * layer + 1]], layer)
        return run(input_ids=given["input_ids"], attention_mask=given["attention_mask"], past_key_values=cache).logits

    def feeds():
        kept = {side: numbers(BATCH, heads, past, width, seed=20 + i) for i, side in enumerate(sides)}
        return {"input_ids": ids(5, 2), "attention_mask": torch.ones(BATCH, past + 2, dtype=torch.int64), **kept}
    free = {"input_ids": ROWS, "attention_mask": {0: "batch", 1: "past_sequence_length + sequence"},
            **{side: {0: "batch", 2: "past_sequence_length"} for side in sides}}
    return Part(call, feeds, free, automatic=True)


family("llama-cache", "Llama with a cache", lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER)), cached(), ATTENTION, EVERYTHING,
       formats=ALL_FORMATS)
family("gpt2-cache", "GPT-2 with a cache",
       lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=32)),
       cached(heads=4), {"target_modules": ["c_attn"], "fan_in_fan_out": True},
       {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True})


# ---- encoders

QUERY = {"target_modules": ["query", "value"]}
DENSE = {"target_modules": ["query", "key", "value", "dense"]}
CLASSES = {"task_type": "SEQ_CLS"}
BERT = SMALL | {"max_position_embeddings": 32, "num_labels": 5, "pad_token_id": 0}


def classifier(name, title, kind, config, a, b, kinds=False, **more):
    family(name, title, lambda: kind(config()), text(kinds=kinds), a, b, **more)


classifier("bert", "BERT", hf.BertForSequenceClassification, lambda: hf.BertConfig(**BERT), QUERY | CLASSES, DENSE, kinds=True,
           formats=ALL_FORMATS)
classifier("roberta", "RoBERTa", hf.RobertaForSequenceClassification, lambda: hf.RobertaConfig(**BERT), QUERY | CLASSES, DENSE,
           formats=FEW_FORMATS)
classifier("xlm-roberta", "XLM-R", hf.XLMRobertaForSequenceClassification, lambda: hf.XLMRobertaConfig(**BERT), QUERY | CLASSES,
           EVERYTHING, formats={"torchscript": ("int8",)})
classifier("distilbert", "DistilBERT", hf.DistilBertForSequenceClassification,
           lambda: hf.DistilBertConfig(vocab_size=VOCABULARY, dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=32,
                                       num_labels=5),
           {"target_modules": ["q_lin", "v_lin"]} | CLASSES, EVERYTHING, formats={"torchscript": ("int8",)})
classifier("albert", "ALBERT", hf.AlbertForSequenceClassification, lambda: hf.AlbertConfig(**BERT, embedding_size=16), QUERY | CLASSES,
           EVERYTHING, kinds=True)
classifier("deberta-v2", "DeBERTa v2, v3", hf.DebertaV2ForSequenceClassification,
           lambda: hf.DebertaV2Config(**BERT, relative_attention=True, max_relative_positions=-1, position_buckets=4,
                                      pos_att_type=["p2c", "c2p"], share_att_key=True, norm_rel_ebd="layer_norm", type_vocab_size=0,
                                      position_biased_input=False),
           {"target_modules": ["query_proj", "value_proj"]} | CLASSES, EVERYTHING)
classifier("modernbert", "ModernBERT", hf.ModernBertForSequenceClassification,
           lambda: hf.ModernBertConfig(**BERT, global_attn_every_n_layers=2, local_attention=4, cls_token_id=1, sep_token_id=2,
                                       bos_token_id=1, eos_token_id=2),
           {"target_modules": ["Wqkv"]} | CLASSES, EVERYTHING)
classifier("electra", "ELECTRA", hf.ElectraForSequenceClassification, lambda: hf.ElectraConfig(**BERT, embedding_size=16), QUERY | CLASSES,
           DENSE, kinds=True)
classifier("mpnet", "MPNet", hf.MPNetForSequenceClassification, lambda: hf.MPNetConfig(**BERT), {"target_modules": ["q", "v"]} | CLASSES,
           EVERYTHING)
family("minilm", "MiniLM, E5 (embeddings)", lambda: hf.BertModel(hf.BertConfig(**BERT), add_pooling_layer=False),
       text(lambda result: result.last_hidden_state, kinds=True, name="last_hidden_state"), QUERY | {"task_type": "FEATURE_EXTRACTION"},
       DENSE, formats=ALL_FORMATS)


# ---- encoder and decoder

def written(run, given):
    """Without a mask of its own, Whisper's decoder looks for several texts in a row, which TorchScript cannot export."""
    hidden, mask, tokens = given["encoder_hidden_states"], given.get("encoder_attention_mask"), given["input_ids"]
    own = {} if mask is not None else {"decoder_attention_mask": torch.ones_like(tokens)}
    return run(encoder_outputs=BaseModelOutput(hidden), attention_mask=mask, decoder_input_ids=tokens, use_cache=False, **own).logits


def decoder_part(mask_too=True, width=32, length=LENGTH):
    free = {"input_ids": {0: "batch", 1: "written"}, "encoder_hidden_states": ROWS, "encoder_attention_mask": ROWS}
    kept = {name: axes for name, axes in free.items() if mask_too or name != "encoder_attention_mask"}

    def feeds():
        made = {"input_ids": ids(5, 4), "encoder_hidden_states": numbers(BATCH, length, width), "encoder_attention_mask": mask()}
        return {name: made[name] for name in kept}
    return Part(written, feeds, kept)


def both(prefix="encoder"):
    """As Optimum writes them: the encoder as a file whose names lack its own, and the decoder, which takes what the encoder gave."""
    return {"encoder": text(lambda result: result.last_hidden_state, name="last_hidden_state", module=prefix), "decoder": decoder_part()}


BART = {"vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 32, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "dropout": 0.0}

family("t5", "T5, FLAN-T5",
       lambda: hf.T5ForConditionalGeneration(hf.T5Config(
           vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
           tie_word_embeddings=False, dropout_rate=0.0, decoder_start_token_id=0)),
       both(), {"target_modules": ["q", "v"]}, {"target_modules": ["q", "k", "v", "o", "wi_0", "wi_1", "wo"]}, formats=FEW_FORMATS)
family("bart", "BART", lambda: hf.BartForConditionalGeneration(hf.BartConfig(**BART)), both("model.encoder"), ATTENTION,
       {"target_modules": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]})
family("marian", "Marian", lambda: hf.MarianMTModel(hf.MarianConfig(**BART)), both("model.encoder"), ATTENTION,
       {"target_modules": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]}, formats=FEW_FORMATS)
family("whisper", "Whisper",
       lambda: hf.WhisperForConditionalGeneration(hf.WhisperConfig(
           **BART, num_mel_bins=8, max_source_positions=8, max_target_positions=32)),
       {"encoder": Part(lambda run, given: run(**given).last_hidden_state, lambda: {"input_features": numbers(BATCH, 8, 16)},
                        {"input_features": {0: "batch"}}, "last_hidden_state", "model.encoder"),
        "decoder": decoder_part(False, length=8)},
       ATTENTION, {"target_modules": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]}, formats=FEW_FORMATS)


# ---- images and sound

VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 32, "patch_size": 8}
HEAD = {"modules_to_save": ["classifier"]}
logits = lambda result: result.logits
last = lambda result: result.last_hidden_state

family("vit", "ViT", lambda: hf.ViTForImageClassification(hf.ViTConfig(**VISION, num_labels=5)), image(logits), ATTENTION,
       EVERYTHING | HEAD, formats=ALL_FORMATS)
family("dinov2", "DINOv2",
       lambda: hf.Dinov2ForImageClassification(hf.Dinov2Config(
           hidden_size=32, num_hidden_layers=2, num_attention_heads=4, mlp_ratio=2, image_size=32, patch_size=8, num_labels=5)),
       image(logits), ATTENTION, EVERYTHING | HEAD)
family("clip", "CLIP, text and image",
       lambda: hf.CLIPModel(hf.CLIPConfig(
           text_config=SMALL | {"max_position_embeddings": 32, "eos_token_id": 2, "projection_dim": 16}, vision_config=VISION | {"projection_dim": 16},
           projection_dim=16)),
       {"text": Part(lambda run, given: run(**given, pixel_values=torch.zeros(1, 3, 32, 32)).text_embeds,
                     lambda: {"input_ids": ids(), "attention_mask": mask()}, {"input_ids": ROWS, "attention_mask": ROWS}, "text_embeds"),
        "vision": Part(lambda run, given: run(**given, input_ids=torch.ones(1, 4, dtype=torch.int64)).image_embeds,
                       lambda: {"pixel_values": numbers(BATCH, 3, 32, 32)}, {"pixel_values": {0: "batch"}}, "image_embeds")},
       ATTENTION, EVERYTHING)
family("sam", "SAM, image encoder",
       lambda: hf.SamModel(hf.SamConfig(
           vision_config={"hidden_size": 32, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
                          "patch_size": 8, "mlp_dim": 48, "window_size": 3, "global_attn_indexes": [1]},
           prompt_encoder_config={"hidden_size": 16, "image_size": 32, "patch_size": 8, "mask_input_channels": 4},
           mask_decoder_config={"hidden_size": 16, "num_attention_heads": 4, "mlp_dim": 24, "iou_head_hidden_dim": 16})),
       image(last, module="vision_encoder", name="image_embeddings"), {"target_modules": ["qkv"]},
       {"target_modules": r"vision_encoder\..*\.(qkv|proj|lin1|lin2)"})
family("swin", "Swin",
       lambda: hf.SwinForImageClassification(hf.SwinConfig(
           image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4, num_labels=5)),
       image(logits), ATTENTION, EVERYTHING | HEAD)
family("convnext", "ConvNeXt",
       lambda: hf.ConvNextForImageClassification(hf.ConvNextConfig(hidden_sizes=[16, 32], depths=[1, 1], num_stages=2, num_labels=5)),
       image(logits), {"target_modules": ["pwconv1"]}, EVERYTHING | HEAD)
family("segformer", "SegFormer",
       lambda: hf.SegformerForSemanticSegmentation(hf.SegformerConfig(
           num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[16, 32], patch_sizes=[7, 3], strides=[4, 2],
           num_attention_heads=[2, 4], mlp_ratios=[2, 2], decoder_hidden_size=16, num_labels=5)),
       image(logits), ATTENTION, EVERYTHING)
SOUND = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 24,
         "conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8,
         "num_conv_pos_embedding_groups": 4}
sound = Part(lambda run, given: run(**given).logits, lambda: {"input_values": numbers(BATCH, 400)}, {"input_values": {0: "batch"}})
family("wav2vec2", "wav2vec 2.0", lambda: hf.Wav2Vec2ForCTC(hf.Wav2Vec2Config(**SOUND)), sound, ATTENTION,
       {"target_modules": ["q_proj", "k_proj", "v_proj", "out_proj", "intermediate_dense", "output_dense"]})
family("hubert", "HuBERT", lambda: hf.HubertForCTC(hf.HubertConfig(**SOUND)), sound, {"target_modules": ["k_proj", "out_proj"]},
       {"target_modules": ["q_proj", "v_proj", "intermediate_dense", "output_dense"]})


# ---- a language model inside a model of images and text

family("llava", "LLaVA: image encoder, and language model",
       lambda: hf.LlavaForConditionalGeneration(hf.LlavaConfig(
           vision_config=hf.CLIPVisionConfig(**VISION), text_config=hf.LlamaConfig(**DECODER), image_token_index=3,
           vision_feature_layer=-1)),
       {"vision": image(lambda result: torch.stack(tuple(result.pooler_output)), module="model", method="get_image_features",
                        name="image_features"),
        "language": Part(lambda run, given: run(**given, use_cache=False).last_hidden_state,
                         lambda: {"inputs_embeds": numbers(BATCH, LENGTH, 32), "attention_mask": mask()},
                         {"inputs_embeds": ROWS, "attention_mask": ROWS}, "last_hidden_state", "model.language_model")},
       ATTENTION, EVERYTHING)


# ---- diffusion

def unet(**more):
    import diffusers
    return diffusers.UNet2DConditionModel(sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4, **more)


def noised(**added):
    feeds = lambda: {"sample": numbers(BATCH, 4, 8, 8), "timestep": torch.tensor([7], dtype=torch.int64),
                     "encoder_hidden_states": numbers(BATCH, LENGTH, 32, seed=6), **{name: make() for name, make in added.items()}}

    def call(run, given):
        more = {"added_cond_kwargs": {name: given.pop(name) for name in added}} if added else {}
        return run(**given, **more, return_dict=False)[0]
    free = {"sample": {0: "batch"}, "encoder_hidden_states": {0: "batch", 1: "sequence"}, **{name: {0: "batch"} for name in added}}
    return Part(call, feeds, free, "out_sample")


TO = {"target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}
family("sd15", "Stable Diffusion 1.5, UNet",
       lambda: unet(down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
                    cross_attention_dim=32, attention_head_dim=4),
       noised(), {"target_modules": ["to_q", "to_v"]},
       {"target_modules": ["to_q", "to_k", "to_v", "to_out.0", "proj", "ff.net.2", "time_emb_proj"]})
family("sdxl", "SDXL, UNet",
       lambda: unet(down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                    cross_attention_dim=32, attention_head_dim=(2, 4), transformer_layers_per_block=(1, 2), use_linear_projection=True,
                    addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=80),
       noised(text_embeds=lambda: numbers(BATCH, 32, seed=8), time_ids=lambda: numbers(BATCH, 6, seed=9)),
       {"target_modules": ["to_q", "to_v"]}, {"target_modules": ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj"]})
