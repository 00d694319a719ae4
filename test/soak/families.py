"""Tiny models of many families with random weights, exported by torch's TorchScript exporter; two PEFT adapters for each, one of
attention, one of nearly all linear layers; and PEFT's answers in f64. families.js runs them.

A folder for each family: base.safetensors, adapters/a, adapters/b, model.onnx, and family.json with feeds and answers.

usage: python families.py FOLDER [FAMILY...]
(torch 2.13, transformers 5.24, peft 0.21, diffusers 0.42, onnx 1.23)
"""
import json, pathlib, sys
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "data/make"))
from graphs import Exported, torchscript
import numpy as np, onnx, torch, transformers as hf
from diffusers import UNet2DConditionModel
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file

BATCH, LENGTH, VOCABULARY = 3, 7, 96
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": VOCABULARY}
DECODER = SMALL | {"num_key_value_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BERT = SMALL | {"max_position_embeddings": 32, "num_labels": 5, "pad_token_id": 0}
IMAGE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8, "num_labels": 5}
ATTENTION, EVERYTHING = {"target_modules": ["q_proj", "v_proj"]}, {"target_modules": "all-linear"}
QUERY, DENSE = {"target_modules": ["query", "value"]}, {"target_modules": ["query", "key", "value", "dense"]}
CLASSES, HEAD = {"task_type": "SEQ_CLS"}, {"modules_to_save": ["classifier"]}


def numbers(*shape, seed=4):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tokens():
    """The second row is two tokens shorter, padded at its end."""
    mask = torch.ones(BATCH, LENGTH, dtype=torch.int64)
    mask[1, -2:] = 0
    ids = torch.randint(4, VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids, "attention_mask": mask}


def picture():
    return {"pixel_values": numbers(BATCH, 3, 32, 32)}


def noised():
    return {"sample": numbers(BATCH, 4, 8, 8), "timestep": torch.tensor([7]), "encoder_hidden_states": numbers(BATCH, LENGTH, 32, seed=6)}


def lm(kind, a=ATTENTION, b=EVERYTHING, config=None, **more):
    """A decoder. Classes of configurations are found by the model's name."""
    made = getattr(hf, config or kind.replace("ForCausalLM", "Config"))
    return lambda: getattr(hf, kind)(made(**(more if "vocab_size" in more else DECODER | more), use_cache=False)), tokens, a, b


def classifier(kind, a=QUERY, b=DENSE, **more):
    made = getattr(hf, f"{kind}Config")
    given = more if "vocab_size" in more else BERT | more
    return lambda: getattr(hf, f"{kind}ForSequenceClassification")(made(**given)), tokens, a | CLASSES, b


def image(kind, a=ATTENTION, b=EVERYTHING | HEAD, task="ImageClassification", **more):
    made = getattr(hf, f"{kind}Config")
    return lambda: getattr(hf, f"{kind}For{task}")(made(**more)), picture, a, b


PACKED = {"target_modules": ["query_key_value"]}
OLD = {"vocab_size": VOCABULARY, "hidden_size": 32}
TURNED = {"fan_in_fan_out": True}
FAMILIES = {
    "llama": lm("LlamaForCausalLM"),
    "mistral": lm("MistralForCausalLM", b=EVERYTHING | {"use_dora": True}, sliding_window=4, head_dim=8),
    "qwen2": lm("Qwen2ForCausalLM", b=EVERYTHING | {"use_rslora": True}),
    "qwen3": lm("Qwen3ForCausalLM", head_dim=8),
    "gemma2": lm("Gemma2ForCausalLM", head_dim=8, sliding_window=4),
    "gemma3": lm("Gemma3ForCausalLM", config="Gemma3TextConfig", head_dim=8, sliding_window=4,
                 layer_types=["sliding_attention", "full_attention"]),
    "phi3": lm("Phi3ForCausalLM", {"target_modules": ["qkv_proj"]}),
    "smollm3": lm("SmolLM3ForCausalLM"),
    "olmo2": lm("Olmo2ForCausalLM"),
    "granite": lm("GraniteForCausalLM", logits_scaling=2.0, residual_multiplier=0.8),
    "stablelm": lm("StableLmForCausalLM"),
    "gpt2": lm("GPT2LMHeadModel", {"target_modules": ["c_attn"]} | TURNED, {"target_modules": ["c_attn", "c_proj", "c_fc"]} | TURNED,
               config="GPT2Config", vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=32),
    "gpt-neox": lm("GPTNeoXForCausalLM", PACKED, **SMALL, max_position_embeddings=32),
    "opt": lm("OPTForCausalLM", ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=32,
              word_embed_proj_dim=32, dropout=0.0, **OLD),
    "bloom": lm("BloomForCausalLM", PACKED, n_layer=2, n_head=4, **OLD),
    "falcon": lm("FalconForCausalLM", PACKED, num_hidden_layers=2, num_attention_heads=4, **OLD),
    "bert": classifier("Bert"),
    "roberta": classifier("Roberta"),
    "distilbert": classifier("DistilBert", {"target_modules": ["q_lin", "v_lin"]}, EVERYTHING, vocab_size=VOCABULARY, dim=32, n_layers=2,
                             n_heads=4, hidden_dim=48, max_position_embeddings=32, num_labels=5),
    "albert": classifier("Albert", b=EVERYTHING, embedding_size=16),
    "deberta-v2": classifier("DebertaV2", {"target_modules": ["query_proj", "value_proj"]}, EVERYTHING, relative_attention=True,
                             max_relative_positions=-1, position_buckets=4, pos_att_type=["p2c", "c2p"], share_att_key=True,
                             norm_rel_ebd="layer_norm", type_vocab_size=0, position_biased_input=False),
    "modernbert": classifier("ModernBert", {"target_modules": ["Wqkv"]}, EVERYTHING, global_attn_every_n_layers=2, local_attention=4,
                             cls_token_id=1, sep_token_id=2, bos_token_id=1, eos_token_id=2),
    "electra": classifier("Electra", embedding_size=16),
    "mpnet": classifier("MPNet", {"target_modules": ["q", "v"]}, EVERYTHING),
    "vit": image("ViT", intermediate_size=48, **IMAGE),
    "dinov2": image("Dinov2", mlp_ratio=2, **IMAGE),
    "swin": image("Swin", image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4, num_labels=5),
    "convnext": image("ConvNext", {"target_modules": ["pwconv1"]}, hidden_sizes=[16, 32], depths=[1, 1], num_stages=2, num_labels=5),
    "segformer": image("Segformer", b=EVERYTHING, task="SemanticSegmentation", num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1],
                       hidden_sizes=[16, 32], patch_sizes=[7, 3], strides=[4, 2], num_attention_heads=[2, 4], mlp_ratios=[2, 2],
                       decoder_hidden_size=16, num_labels=5),
    "wav2vec2": (lambda: hf.Wav2Vec2ForCTC(hf.Wav2Vec2Config(
        **SMALL, conv_dim=(16, 16), conv_stride=(5, 4), conv_kernel=(10, 8), num_feat_extract_layers=2, num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=4)), lambda: {"input_values": numbers(BATCH, 400)}, ATTENTION,
        {"target_modules": ["k_proj", "out_proj", "intermediate_dense", "output_dense"]}),
    "unet": (lambda: UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4, cross_attention_dim=32, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")), noised,
        {"target_modules": ["to_q", "to_v"]}, {"target_modules": ["to_q", "to_k", "to_out.0", "proj", "ff.net.2", "time_emb_proj"]}),
}


def filled(model, seed, gain, adapter=False):
    """Random weights, of an adapter those that it trains; wide enough that every layer and every adapter matters."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if adapter and (not parameter.requires_grad or "original_module" in name):
            continue
        wide = parameter.ndim > 1 and (not adapter or "lora_" in name)
        parameter.data = gain * noise / float(np.prod(parameter.shape[1:])) ** 0.5 if wide else parameter.data + 0.1 * noise
    return model.eval()


def make(name, folder):
    build, feeds, *adapters = FAMILIES[name]

    def base():
        torch.manual_seed(1)
        return filled(build(), 1, 0.8)

    folder.mkdir(parents=True)
    save_file({key: value.contiguous().clone() for key, value in base().state_dict().items()}, folder / "base.safetensors")
    answers = {}
    for task, config in zip(("base", "a", "b"), ({}, *adapters)):
        model = base()
        if task != "base":
            peft = get_peft_model(model, LoraConfig(**{"lora_alpha": 6, "r": 3 if task == "a" else 5} | config))
            filled(peft, ord(task), 0.6, adapter=True).save_pretrained(folder / "adapters" / task)
            model = PeftModel.from_pretrained(base(), folder / "adapters" / task).eval().get_base_model()
        with torch.no_grad():
            exact = {key: value.double() if value.is_floating_point() else value for key, value in feeds().items()}
            answers[task] = model.double()(**exact, return_dict=True)[0].flatten()
        apart = (answers[task] - answers["base"]).abs().max() / answers["base"].abs().max()
        assert task == "base" or apart > 0.02, f"{name}, {task}: changes only {apart:.1e}"
    model = base()
    if isinstance(model, hf.PreTrainedModel):
        model.set_attn_implementation("eager")
    rows = {key: {0: "batch", **({1: "sequence"} if value.dtype == torch.int64 else {})} for key, value in feeds().items() if value.ndim > 1}
    plain = Exported(model, lambda *values: model(**dict(zip(feeds(), values)), return_dict=True)[0])
    onnx.save(torchscript(plain, tuple(feeds().values()), {key: rows.get(key) for key in feeds()}, {"answer": None}), folder / "model.onnx")
    described = {key: {"type": str(value.dtype).removeprefix("torch."), "dims": list(value.shape), "data": value.flatten().tolist()}
                 for key, value in feeds().items()}
    (folder / "family.json").write_text(json.dumps({"feeds": described, "answers": {task: all.tolist() for task, all in answers.items()}}))


for name in sys.argv[2:] or FAMILIES:
    make(name, pathlib.Path(sys.argv[1]) / name)
