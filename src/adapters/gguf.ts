/**
 * Reads a LoRA that llama.cpp's convert_lora_to_gguf.py wrote into the canonical form: names, orientation, and the
 * order of rows that llama.cpp changes for rotary embedding are those of transformers again. Portable: folders are read
 * in folder.ts.
 */

import { AdapterError } from "../errors.ts";
import { type GgufFile, openGguf } from "../tensor/gguf.ts";
import { transpose } from "../tensor/term.ts";
import {
  type Adapter,
  type AdapterModule,
  type BasedAdapterFile,
  type BaseFacts,
  checkAdapter,
  type Derived,
  type Exportable,
  f32Bytes,
  factorsOf,
  openFile,
  readAdapterFile,
  refuseModule,
  refuseSaved,
  transposed,
  withDerived,
} from "./adapter.ts";
import { assembleLora, type LoraKey, sortTensors } from "./named-lora.ts";
import { refuser } from "./peft.ts";

/**
 * Opens an adapter: checks its header and the names, shapes and types of all tensors. Values are read, and checked,
 * when a module's `read` is called. F32, F16, BF16 and Q8_0 are read.
 * @throws AdapterError naming the field or tensor that cannot be represented, and what to do
 * @throws FormatError when the file breaks the GGUF format; SourceError when it cannot be read
 * @example
 * const base = { heads: 4, kvHeads: 2 }; // num_attention_heads and num_key_value_heads of the model's config.json
 * const adapter = await readGguf({ id: "rhymes", file: "rhymes.gguf", tensors: "rhymes.gguf", base });
 */
export async function readGguf({ base = {}, ...files }: BasedAdapterFile): Promise<Adapter> {
  return readAdapterFile(
    files,
    (input) => openFile(input, openGguf, "a GGUF file"),
    (found) => {
      const { name, architecture } = architectureOf(found);
      const tensors = asTransformers(found, name, architecture, base);
      const expected = `no weight of ${name} that is known, with .weight.lora_a or .lora_b behind it`;
      const parts = sortTensors(
        tensors,
        (key) => parseKey(key, architecture),
        () => expected,
      );
      const alpha = alphaOf(found);
      const scaleOf = (_: string, rank: number): number => (alpha === 0 ? 1 : alpha / rank);
      return { ...assembleLora(tensors, parts, scaleOf), baseModel: textOf(found, "general.base_model.0.name") };
    },
  );
}

function textOf({ fields }: GgufFile, name: string): string | undefined {
  const found = fields.get(name);
  return typeof found === "string" && found !== "" ? found : undefined;
}

/** @throws AdapterError when it is no LoRA, or has an unknown architecture */
function architectureOf(file: GgufFile): { name: string; architecture: GgufArchitecture } {
  const refuse = refuser(file);
  for (const [field, expected] of [
    ["general.type", "adapter"],
    ["adapter.type", "lora"],
  ] as const) {
    const found = textOf(file, field);
    if (found !== expected)
      throw refuse(field, `${field} is ${found ?? "not there"}, expected ${expected}: not a LoRA of llama.cpp`);
  }
  if (file.fields.get("adapter.alora.invocation_tokens") !== undefined)
    throw refuse(
      "adapter.alora.invocation_tokens",
      "applies the update after some tokens only (aLoRA): no weight can. Train a plain LoRA",
    );
  const name = textOf(file, "general.architecture") ?? "not there";
  const architecture = ARCHITECTURES.get(name);
  if (architecture) return { name, architecture };
  const known = [...ARCHITECTURES.keys()].join(", ");
  throw refuse(
    "general.architecture",
    `general.architecture is ${name}, whose names and order of rows are not known; expected one of ${known}. Pack the adapter ` +
      "that it was converted from",
  );
}

function alphaOf(file: GgufFile): number {
  const alpha = file.fields.get("adapter.lora.alpha") ?? 0;
  if (typeof alpha === "number" && Number.isFinite(alpha)) return alpha;
  throw refuser(file)(
    "adapter.lora.alpha",
    `adapter.lora.alpha is ${String(alpha)}, expected a number; convert it again`,
  );
}

/** The weight that a tensor belongs to, and its factor. */
function split(key: string): { weight: string; factor: "A" | "B" } | undefined {
  const [, weight = "", factor] = /^(.+)\.weight\.lora_([ab])$/.exec(key) ?? [];
  return factor === undefined ? undefined : { weight, factor: factor === "a" ? "A" : "B" };
}

function parseKey(key: string, { modules }: GgufArchitecture): LoraKey | undefined {
  const found = split(key);
  if (found === undefined) return undefined;
  const { pattern, layer } = generic(found.weight);
  const module = modules.get(pattern)?.replace("N", layer ?? "N");
  if (module === undefined) return undefined;
  const part = found.weight === EMBEDDING ? (`embedding${found.factor}` as const) : found.factor;
  return { module, part };
}

/** Gives a file the orientation and the order of rows that its weights have in transformers. */
function asTransformers(file: GgufFile, name: string, { permuted }: GgufArchitecture, base: BaseFacts): GgufFile {
  const derived = new Map<string, Derived>();
  for (const [key, { dtype, shape }] of file.tensors) {
    const { weight = "", factor } = split(key) ?? {};
    // An embedding's rows are tokens, which are looked up: [vocabulary, r].
    if (weight === EMBEDDING && factor === "A" && shape.length === 2) derived.set(key, transposed(file, key));
    const which = permuted.get(generic(weight).pattern);
    if (factor !== "B" || which === undefined) continue;
    const heads = base[which];
    const [out = 0] = shape;
    if (heads === undefined || out % (2 * heads) !== 0) {
      const why =
        heads === undefined
          ? "the file does not say how many there are"
          : `${out} rows do not make ${heads} heads of an even number of rows`;
      const how = "Give the base (`base`): its folder, config.json or GGUF file";
      throw refuser(file)(key, `${key}: llama.cpp orders the rows of ${name} by heads, and ${why}. ${how}`);
    }
    derived.set(key, {
      dtype,
      shape,
      read: async (options) => permuteRows(await file.readF32(key, options), out, heads, true),
    });
  }
  return withDerived(file, derived);
}

// Names of weights in GGUF files, by architecture, and the modules of transformers they stand for (gguf-py,
// tensor_mapping.py; llama.cpp's convert_hf_to_gguf.py). Unknown architectures are refused, since a wrong order of rows
// would go unnoticed.

interface GgufArchitecture {
  /** Modules by GGUF's names; N stands for the number of the layer. */
  readonly modules: ReadonlyMap<string, string>;
  /** Weights whose rows are reordered by heads, so that rotary embedding works on neighbours. */
  readonly permuted: ReadonlyMap<string, "heads" | "kvHeads">;
}

/** GGUF's name of the embedding, whose two factors are swapped. */
const EMBEDDING = "token_embd";

const BY_HEADS: GgufArchitecture["permuted"] = new Map([
  ["blk.N.attn_q", "heads"],
  ["blk.N.attn_k", "kvHeads"],
]);

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

/** Architectures by `general.architecture`. Mistral and SmolLM2 use "llama" too. */
const ARCHITECTURES: ReadonlyMap<string, GgufArchitecture> = new Map(
  Object.entries({
    llama: LLAMA,
    qwen2: LLAMA,
    qwen3: LLAMA,
    gemma: LLAMA,
    gemma2: LLAMA,
    gemma3: LLAMA,
    phi3: PHI3,
    bert: BERT,
  }).map(([name, modules]) => [
    name,
    { modules: new Map(Object.entries(modules)), permuted: name === "llama" ? BY_HEADS : new Map() },
  ]),
);

/** Replaces the number of the layer in a name by N. */
function generic(name: string): { pattern: string; layer: string | undefined } {
  const [, before, layer, after] = /^(.*?\.)(\d+)(\..+)$/.exec(name) ?? [];
  return layer === undefined ? { pattern: name, layer: undefined } : { pattern: `${before}N${after}`, layer };
}

/**
 * Reorders rows of queries and keys of Llama's architecture as llama.cpp does (`permute` of convert_hf_to_gguf.py):
 * rotary embedding rotates pairs of rows, which transformers keeps half a head apart and llama.cpp next to each other.
 * @param values [rows, columns], rows a multiple of 2 · heads
 * @param back from llama.cpp's order to transformers'
 */
function permuteRows(values: Float32Array, rows: number, heads: number, back: boolean): Float32Array<ArrayBuffer> {
  const columns = values.length / rows;
  const half = rows / heads / 2;
  const out = new Float32Array(values.length);
  for (let row = 0; row < rows; row++) {
    const inHead = row % (2 * half);
    // `row` is an index in transformers' order: the `pair`-th of its head's first or second half.
    const pair = row - inHead + 2 * (inHead % half) + Math.floor(inHead / half);
    const from = (back ? pair : row) * columns;
    out.set(values.subarray(from, from + columns), (back ? row : pair) * columns);
  }
  return out;
}

// Writes a canonical adapter as a GGUF file with the same weights, which llama.cpp, wllama and llama.rn load with a
// model of the same architecture. Scales stay in B: an alpha of 0 means a scale of 1.

/**
 * Makes the bytes of a GGUF file (f32), chunk by chunk. Holds one adapter in memory.
 * @param base its architecture by llama.cpp's name ("llama", "qwen2"), and for "llama" its heads
 * @throws AdapterError for heads, biases, DoRA, convolutions, and modules that the architecture does not have
 * @example
 * const base = { architecture: "llama", heads: 4, kvHeads: 2 }; // of the model's config.json
 * await writeFile("rhymes.gguf", await ggufFile(await taskAdapter(writing, "rhymes"), base));
 */
export async function ggufFile(adapter: Exportable, base: BaseFacts): Promise<AsyncIterable<Uint8Array>> {
  checkAdapter("ggufFile", adapter);
  refuseSaved(adapter, "a GGUF file");
  const { architecture: name } = base;
  const architecture = ARCHITECTURES.get(name ?? "");
  if (name === undefined || architecture === undefined) {
    const found = name === undefined ? "is not known" : `"${name}" is none whose names are known`;
    const known = [...ARCHITECTURES.keys()].join(", ");
    throw new AdapterError(
      `the base's architecture ${found}; expected one of ${known}. Give the base (\`base\`): its config.json or GGUF file`,
      { file: adapter.id, field: "architecture" },
    );
  }
  const tensors: GgufEntry[] = [];
  for (const module of adapter.modules.values())
    tensors.push(...(await entriesOf(adapter, module, architecture, base)));
  const fields = new Map<string, string | number>([
    ["general.architecture", name],
    ["general.type", "adapter"],
    ["general.name", adapter.id],
    ["adapter.type", "lora"],
    ["adapter.lora.alpha", 0],
  ]);
  return writeGguf(fields, tensors);
}

async function entriesOf(
  adapter: Exportable,
  module: AdapterModule,
  architecture: GgufArchitecture,
  base: BaseFacts,
): Promise<GgufEntry[]> {
  const { name, out, layout } = module;
  const found = weightOf(name, architecture);
  if (found === undefined) throw refuseModule(adapter, name, `is no weight of ${base.architecture} that is known`);
  const embedding = found.weight === EMBEDDING;
  if (layout !== (embedding ? "embedding" : "out-in"))
    throw refuseModule(adapter, name, `is stored as ${layout}, which GGUF has no place for`);
  const { A, B, magnitude } = await factorsOf(module);
  if (magnitude) throw refuseModule(adapter, name, "has a magnitude (DoRA), which llama.cpp does not apply");
  const [rank = 1, inputs = 0] = A.shape;
  const which = architecture.permuted.get(found.pattern);
  const heads = which && base[which];
  if (which && (heads === undefined || out % (2 * heads) !== 0)) {
    const message = `${name}: its ${out} rows are ordered by heads, and ${heads ?? "no"} heads are known; give the base`;
    throw new AdapterError(message, { file: adapter.id, field: name });
  }
  // An embedding's A is [vocabulary, r], since its rows are looked up.
  const a = embedding ? transpose(A.values, rank, inputs) : A.values;
  const b = heads ? permuteRows(B.values, out, heads, false) : B.values;
  const entry = (side: string, shape: readonly number[], values: Float32Array): GgufEntry => ({
    name: `${found.weight}.weight.lora_${side}`,
    shape,
    bytes: f32Bytes(values),
  });
  return [entry("a", embedding ? [inputs, rank] : [rank, inputs], a), entry("b", B.shape, b)];
}

/** GGUF's name of a module. The module's name may have more in front than the architecture's. */
function weightOf(name: string, { modules }: GgufArchitecture): { weight: string; pattern: string } | undefined {
  for (const [pattern, module] of modules) {
    const [before = "", after] = module.split("N");
    const at = `.${name}`.indexOf(`.${before}`);
    if (at < 0) continue;
    const rest = name.slice(at + before.length);
    if (after === undefined ? rest === "" : rest.endsWith(after) && /^\d+$/.test(rest.slice(0, -after.length)))
      return { weight: pattern.replace("N", after === undefined ? "N" : rest.slice(0, -after.length)), pattern };
  }
  return undefined;
}

// Writes the GGUF format, version 3. Readers do without it.

interface GgufEntry {
  readonly name: string;
  /** Row-major, as everywhere here; GGUF lists dimensions the other way round. */
  readonly shape: readonly number[];
  /** Little-endian f32. */
  readonly bytes: Uint8Array;
}

const ALIGNMENT = 32;
const [UINT32, FLOAT32, STRING] = [4, 6, 8];

/**
 * The bytes of a GGUF file, chunk by chunk.
 * @param fields of the header: strings, and numbers, which are written as f32
 */
async function* writeGguf(
  fields: ReadonlyMap<string, string | number>,
  entries: readonly GgufEntry[],
): AsyncGenerator<Uint8Array, void> {
  const header: number[] = [];
  const u32 = (value: number): void => {
    for (const shift of [0, 8, 16, 24]) header.push((value >>> shift) & 255);
  };
  const u64 = (value: number): void => {
    u32(value % 2 ** 32);
    u32(Math.floor(value / 2 ** 32));
  };
  const text = (value: string): void => {
    const bytes = new TextEncoder().encode(value);
    u64(bytes.length);
    for (const byte of bytes) header.push(byte);
  };
  header.push(...new TextEncoder().encode("GGUF"));
  u32(3);
  u64(entries.length);
  u64(fields.size + 1);
  text("general.alignment");
  u32(UINT32);
  u32(ALIGNMENT);
  for (const [name, value] of fields) {
    text(name);
    u32(typeof value === "string" ? STRING : FLOAT32);
    if (typeof value === "string") text(value);
    else header.push(...f32Bytes(Float32Array.of(value)));
  }
  let offset = 0;
  for (const { name, shape, bytes } of entries) {
    text(name);
    u32(shape.length);
    for (const size of [...shape].reverse()) u64(size);
    u32(0);
    u64(offset);
    offset += bytes.length + padding(bytes.length);
  }
  header.push(...new Uint8Array(padding(header.length)));
  yield Uint8Array.from(header);
  for (const { bytes } of entries) {
    yield bytes;
    if (padding(bytes.length) > 0) yield new Uint8Array(padding(bytes.length));
  }
}

/** Bytes up to the next place where a tensor may begin. */
function padding(length: number): number {
  return (ALIGNMENT - (length % ALIGNMENT)) % ALIGNMENT;
}
