"""
A tiny LLaMA as two GGUF files, by the gguf package: the base of test/data/goldens/formats/gguf, and the same with PEFT's merged weights.
Embeddings are random, norms are ones, and every byte is a token.

usage: python llama-base.py GOLDENS OUT
"""
import sys
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import load_file

golden, out = Path(sys.argv[1]), Path(sys.argv[2])
HEADS, KV_HEADS, WIDTH, FEED, LAYERS = 4, 2, 64, 96, 2
TOKENS = 256
random = np.random.default_rng(1)
embedding = random.standard_normal((TOKENS, WIDTH)).astype(np.float32)
output = random.standard_normal((TOKENS, WIDTH)).astype(np.float32)
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}


def permuted(weight, heads):
    """Rows of queries and keys in the order of llama.cpp's rotary embedding, as its converter writes them."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


for name in ("base", "merged"):
    weights = load_file(golden / f"{name}.safetensors")
    writer = gguf.GGUFWriter(out / f"{name}.gguf", "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(TOKENS)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<0x{i:02X}>" for i in range(TOKENS)])
    writer.add_token_scores([0.0] * TOKENS)
    writer.add_token_types([gguf.TokenType.BYTE] * TOKENS)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_tensor("token_embd.weight", embedding)
    writer.add_tensor("output.weight", output)
    writer.add_tensor("output_norm.weight", np.ones(WIDTH, np.float32))
    for layer in range(LAYERS):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{norm}.weight", np.ones(WIDTH, np.float32))
        for module, short in NAMES.items():
            weight = weights[f"model.layers.{layer}.{module}.weight"]
            if short in ("attn_q", "attn_k"):
                weight = permuted(weight, HEADS if short == "attn_q" else KV_HEADS)
            writer.add_tensor(f"blk.{layer}.{short}.weight", np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
