"""The model of scale_model.py as llama.cpp reads it: the same weights in blocks of 4 bits (Q4_0), norms in f32.

usage: python scale_gguf.py FOLDER SIZE    (gguf, torch, transformers; writes FOLDER/model.gguf)
"""
import os, pathlib, sys
import gguf, numpy as np, torch
import scale_model

NAMES = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
         "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
         "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}


def named(name):
    """llama.cpp's name of a parameter."""
    name = name.removeprefix("model.")
    if not name.startswith("layers."):
        return {"embed_tokens.weight": "token_embd.weight", "norm.weight": "output_norm.weight"}[name]
    _, layer, *module, kind = name.split(".")
    return f"blk.{layer}.{NAMES['.'.join(module)]}.{kind}"


def write_gguf(path, size):
    layers, hidden, heads, kv, inner, vocabulary = scale_model.SHAPES[size]
    to = gguf.GGUFWriter(path, "qwen2")
    to.add_block_count(layers)
    to.add_context_length(32768)
    to.add_embedding_length(hidden)
    to.add_feed_forward_length(inner)
    to.add_head_count(heads)
    to.add_head_count_kv(kv)
    to.add_layer_norm_rms_eps(1e-6)
    to.add_rope_freq_base(10000.0)
    to.add_vocab_size(vocabulary)
    to.add_tokenizer_model("gpt2")
    to.add_tokenizer_pre("qwen2")
    to.add_token_list([f"t{i}" for i in range(vocabulary)])
    to.add_token_types([gguf.TokenType.NORMAL] * vocabulary)
    to.add_token_merges(["t 1"])
    to.add_eos_token_id(2)
    kinds = gguf.GGMLQuantizationType
    for name, parameter in scale_model.seeded_model(size).named_parameters():
        values = parameter.detach().float().numpy()
        if values.ndim == 1:
            to.add_tensor(named(name), values)
        else:
            to.add_tensor(named(name), gguf.quants.quantize(values, kinds.Q4_0), raw_dtype=kinds.Q4_0)
    to.write_header_to_file()
    to.write_kv_data_to_file()
    to.write_tensors_to_file()
    to.close()


if __name__ == "__main__":
    path = pathlib.Path(sys.argv[1]) / "model.gguf"
    write_gguf(f"{path}.part", sys.argv[2])
    os.replace(f"{path}.part", path)
