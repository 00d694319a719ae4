/**
 * Names of weights in GGUF files, by architecture, and the modules of transformers they stand for (gguf-py, tensor_mapping.py;
 * llama.cpp's convert_hf_to_gguf.py). Unknown architectures are refused, since a wrong order of rows would go unnoticed.
 */

/** How an architecture names and orders weights. */
export interface GgufArchitecture {
  /** Modules by GGUF's names; N stands for the number of the layer. */
  readonly modules: ReadonlyMap<string, string>;
  /** Weights whose rows are reordered by heads, so that rotary embedding works on neighbours. */
  readonly permuted: ReadonlyMap<string, "heads" | "kvHeads">;
}

/** GGUF's name of the embedding, whose two factors are swapped. */
export const EMBEDDING = "token_embd";

const LLAMA = {
  [EMBEDDING]: "model.embed_tokens",
  output: "lm_head",
  "blk.N.attn_q": "model.layers.N.self_attn.q_proj",
  "blk.N.attn_k": "model.layers.N.self_attn.k_proj",
  "blk.N.attn_v": "model.layers.N.self_attn.v_proj",
  "blk.N.attn_output": "model.layers.N.self_attn.o_proj",
  "blk.N.ffn_gate": "model.layers.N.mlp.gate_proj",
  "blk.N.ffn_up": "model.layers.N.mlp.up_proj",
  "blk.N.ffn_down": "model.layers.N.mlp.down_proj",
};
const PHI3 = {
  [EMBEDDING]: "model.embed_tokens",
  output: "lm_head",
  "blk.N.attn_qkv": "model.layers.N.self_attn.qkv_proj",
  "blk.N.attn_output": "model.layers.N.self_attn.o_proj",
  "blk.N.ffn_up": "model.layers.N.mlp.gate_up_proj",
  "blk.N.ffn_down": "model.layers.N.mlp.down_proj",
};
const BERT = {
  [EMBEDDING]: "embeddings.word_embeddings",
  "blk.N.attn_q": "encoder.layer.N.attention.self.query",
  "blk.N.attn_k": "encoder.layer.N.attention.self.key",
  "blk.N.attn_v": "encoder.layer.N.attention.self.value",
  "blk.N.attn_output": "encoder.layer.N.attention.output.dense",
  "blk.N.ffn_up": "encoder.layer.N.intermediate.dense",
  "blk.N.ffn_down": "encoder.layer.N.output.dense",
};

const architecture = (modules: Readonly<Record<string, string>>, permuted = false): GgufArchitecture => ({
  modules: new Map(Object.entries(modules)),
  permuted: new Map(
    permuted
      ? [
          ["blk.N.attn_q", "heads"],
          ["blk.N.attn_k", "kvHeads"],
        ]
      : [],
  ),
});

/** Architectures by `general.architecture`. Mistral and SmolLM2 use "llama" too. */
export const ARCHITECTURES: ReadonlyMap<string, GgufArchitecture> = new Map([
  ["llama", architecture(LLAMA, true)],
  ...["qwen2", "qwen3", "gemma", "gemma2", "gemma3"].map((name) => [name, architecture(LLAMA)] as const),
  ["phi3", architecture(PHI3)],
  ["bert", architecture(BERT)],
]);

/** Replaces the number of the layer in a name by N. */
export function generic(name: string): { pattern: string; layer: string | undefined } {
  const [, before, layer, after] = /^(.*?\.)(\d+)(\..+)$/.exec(name) ?? [];
  return layer === undefined ? { pattern: name, layer: undefined } : { pattern: `${before}N${after}`, layer };
}

/**
 * Reorders rows of queries and keys of Llama's architecture as llama.cpp does (`permute` of convert_hf_to_gguf.py): rotary embedding
 * rotates pairs of rows, which transformers keeps half a head apart and llama.cpp side by side.
 * @param values [rows, columns], rows a multiple of 2 · heads
 * @param way "into pairs": from transformers' order to llama.cpp's; "out of pairs": back
 */
export function permuteRows(
  values: Float32Array,
  rows: number,
  heads: number,
  way: "into pairs" | "out of pairs",
): Float32Array<ArrayBuffer> {
  const columns = values.length / rows;
  const half = rows / heads / 2;
  const out = new Float32Array(values.length);
  for (let row = 0; row < rows; row++) {
    const [head, inHead] = [Math.floor(row / (2 * half)), row % (2 * half)];
    // `row` is an index in transformers' order: the `pair`-th of its head's first or second half.
    const pair = head * 2 * half + 2 * (inHead % half) + Math.floor(inHead / half);
    const [from, to] = way === "into pairs" ? [row, pair] : [pair, row];
    out.set(values.subarray(from * columns, (from + 1) * columns), to * columns);
  }
  return out;
}
