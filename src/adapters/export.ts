/**
 * Writes a canonical adapter as the two files that PEFT loads, with the same weights. Scales stay in B, so every module's alpha equals
 * its rank. Makes the contents only; the caller writes them.
 */

import { AdapterError } from "../errors.ts";
import { isHead } from "../format/format.ts";
import type { SafetensorsEntry } from "../tensor/safetensors.ts";
import { transpose } from "../tensor/tensor-file.ts";
import {
  type AdapterFactors,
  type AdapterModule,
  checkAdapter,
  type Exportable,
  type FactorMatrix,
  f32Bytes,
  factorsOf,
  rankOf,
  refuseBoth,
  refuseModule,
  refuseSaved,
} from "./adapter.ts";
import type { BaseFacts } from "./base-facts.ts";
import { bareModel, prefixOf } from "./diffusers.ts";
import { ARCHITECTURES, EMBEDDING, type GgufArchitecture, permuteRows } from "./gguf.ts";
import { flatten } from "./kohya.ts";
import { IDENTIFIER } from "./onnx-adapter.ts";
import { headsOf } from "./peft.ts";

const PREFIX = "base_model.model.";

/** Adds one tensor, under its name in the base model. */
type Add = (name: string, shape: readonly number[], values: Float32Array) => void;

/**
 * Makes the contents of adapter_config.json and of adapter_model.safetensors (f32), for `writeSafetensors` with the metadata `format:
 * "pt"` that PyTorch's tools expect. Holds one adapter in memory.
 * @throws AdapterError when PEFT's format, which has one switch per adapter for DoRA, `lora_bias` and the orientation of weights, cannot
 * express this adapter; and errors of the adapter's `read`
 */
export async function peftFiles(adapter: Exportable): Promise<{ config: object; tensors: SafetensorsEntry[] }> {
  checkAdapter("peftFiles", adapter);
  refuseBoth({ ...adapter, file: adapter.id });
  const tensors: SafetensorsEntry[] = [];
  const add: Add = (name, shape, values) => {
    const bytes = f32Bytes(values);
    tensors.push({ name: PREFIX + name, dtype: "F32", shape: [...shape], read: () => bytes });
  };
  const dora: string[] = [];
  for (const module of adapter.modules.values()) if (await addModule(module, add)) dora.push(module.name);
  const config = configOf(adapter, dora, await addSaved(adapter, add));
  return { config, tensors };
}

function refusal({ id }: Exportable, field: string, message: string): AdapterError {
  return new AdapterError(`${message}; fold it into its base instead`, { file: id, field });
}

/** Modules, by what they have beside their factors. */
interface SavedModules {
  readonly heads: Set<string>;
  readonly biased: string[];
  readonly deltas: string[];
  readonly rows: [string, readonly number[]][];
}

/** Adds the saved tensors. */
async function addSaved(adapter: Exportable, add: Add): Promise<SavedModules> {
  const taskType = taskTypeOf(adapter);
  const found: SavedModules = { heads: new Set(), biased: [], deltas: [], rows: [] };
  for (const tensor of adapter.saved) {
    const { name, role, shape, indices = [] } = tensor;
    const owner = name.slice(0, Math.max(0, name.lastIndexOf(".")));
    const adapted = adapter.modules.has(owner);
    let key = name;
    if (role === "saved") found.heads.add(headModule(owner, taskType));
    else if (role === "rows") {
      found.rows.push([owner, indices]);
      key = `${owner}.token_adapter.trainable_tokens_delta`;
    } else if (role === "bias") {
      found.biased.push(owner);
      if (adapted) key = `${owner}.base_layer.bias`;
    } else {
      if (!adapted)
        throw refusal(adapter, name, `${name}: PEFT has no place for a bias delta of a module that is not adapted`);
      found.deltas.push(owner);
      key = `${owner}.lora_B.bias`;
    }
    add(key, shape, await tensor.read());
  }
  return found;
}

/** Contents of adapter_config.json. @throws AdapterError for a switch that only some modules need */
function configOf(adapter: Exportable, dora: readonly string[], { heads, biased, deltas, rows }: SavedModules): object {
  const modules = [...adapter.modules.values()];
  const all = (what: string, some: readonly string[]): boolean => {
    const without = modules.find(({ name }) => !some.includes(name));
    if (some.length > 0 && without !== undefined) {
      const message = `${what} is one switch for all modules in PEFT, but ${without.name} does not have it`;
      throw refusal(adapter, what, message);
    }
    return some.length > 0;
  };
  const inOut = modules.find(({ layout }) => layout === "in-out");
  const outIn = modules.find(({ layout }) => layout === "out-in");
  if (inOut && outIn) {
    const both = `${inOut.name} is [in, out] and ${outIn.name} [out, in]`;
    throw refusal(adapter, "fan_in_fan_out", `fan_in_fan_out is one switch for all modules in PEFT, but ${both}`);
  }
  const [useDora, loraBias] = [all("use_dora", dora), all("lora_bias", deltas)];
  if (useDora && loraBias) throw refusal(adapter, "lora_bias", "PEFT does not combine lora_bias with use_dora");

  const rank = commonRank(modules);
  const odd = modules.filter((module) => rankOf(module) !== rank);
  const pattern = Object.fromEntries(odd.map((module) => [exactly(module.name), rankOf(module)]));
  const onlyAdapted = biased.every((owner) => adapter.modules.has(owner));
  return {
    peft_type: "LORA",
    task_type: taskTypeOf(adapter) ?? null,
    base_model_name_or_path: adapter.baseModel ?? null,
    revision: adapter.metadata.revision ?? null,
    inference_mode: true,
    r: rank,
    lora_alpha: rank,
    lora_dropout: 0,
    rank_pattern: pattern,
    alpha_pattern: pattern,
    target_modules: modules.map(({ name }) => name),
    fan_in_fan_out: inOut !== undefined,
    bias: biased.length === 0 ? "none" : onlyAdapted ? "lora_only" : "all",
    use_dora: useDora,
    use_rslora: false,
    lora_bias: loraBias,
    init_lora_weights: true,
    modules_to_save: heads.size > 0 ? outermost(heads) : null,
    trainable_token_indices: rows.length > 0 ? Object.fromEntries(rows) : null,
  };
}

/** Adds one module's tensors. @returns whether it has a magnitude */
async function addModule(module: AdapterModule, add: Add): Promise<boolean> {
  const { name, out, layout, kernel = [] } = module;
  const { A, B, magnitude } = await factorsOf(module);
  const [keyA, keyB] =
    layout === "embedding" ? ["lora_embedding_A", "lora_embedding_B"] : ["lora_A.weight", "lora_B.weight"];
  add(`${name}.${keyA}`, A.shape, A.values);
  add(`${name}.${keyB}`, B.shape, B.values);
  if (magnitude === undefined) return false;
  add(`${name}.lora_magnitude_vector`, layout === "conv" ? [1, out, ...kernel.map(() => 1)] : [out], magnitude);
  return true;
}

function taskTypeOf({ metadata, saved }: Exportable): string | undefined {
  if (typeof metadata.task_type === "string") return metadata.task_type;
  const head = saved.find(({ name, role }) => role === "saved" && isHead(name));
  return head === undefined ? undefined : "SEQ_CLS";
}

/**
 * The module that PEFT must save whole to hold a parameter of `owner`: the head around it where the task type has one, since PEFT wraps
 * that head anyway, else `owner` itself.
 */
function headModule(owner: string, taskType: string | undefined): string {
  const heads = headsOf(taskType);
  const path = owner.split(".").map((_, i, all) => all.slice(0, i + 1).join("."));
  return path.find((module) => heads.some((head) => module.endsWith(head))) ?? owner;
}

/** Drops modules inside another: PEFT saves a module with its children. */
function outermost(modules: ReadonlySet<string>): string[] {
  return [...modules].filter((name) => ![...modules].some((other) => name.startsWith(`${other}.`))).sort();
}

/** The rank of most modules, the smaller on a tie, so that fewest patterns are needed for the others. */
function commonRank(modules: readonly AdapterModule[]): number {
  const counts = new Map<number, number>();
  for (const module of modules) counts.set(rankOf(module), (counts.get(rankOf(module)) ?? 0) + 1);
  return [...counts].sort((a, b) => b[1] - a[1] || a[0] - b[0])[0]?.[0] ?? 1;
}

/** A PEFT pattern that matches one module only: the anchor leaves nothing for PEFT's `(.*\.)?` in front. */
function exactly(name: string): string {
  return `^${name.replaceAll(/[\\^$.*+?()[\]{}|]/g, "\\$&")}`;
}

// Writes a canonical adapter as a GGUF file with the same weights, which llama.cpp, wllama and llama.rn load beside a model of the same
// architecture. Scales stay in B: an alpha of 0 means a scale of 1.

/**
 * Makes the bytes of a GGUF file (f32), chunk by chunk. Holds one adapter in memory.
 * @param base its architecture by llama.cpp's name ("llama", "qwen2"), and for "llama" its heads
 * @param marks more fields of the header. Default: none
 * @throws AdapterError for heads, biases, DoRA, convolutions, and modules that the architecture does not have
 * @example
 * const base = { architecture: "llama", heads: 4, kvHeads: 2 }; // of the model's config.json
 * await writeFile("rhymes.gguf", await ggufFile(await taskAdapter(writing, "rhymes"), base));
 */
export async function ggufFile(
  adapter: Exportable,
  base: BaseFacts,
  marks: ReadonlyMap<string, string> = new Map(),
): Promise<AsyncIterable<Uint8Array>> {
  checkAdapter("ggufFile", adapter);
  refuseSaved(adapter, "a GGUF file");
  const { architecture: name } = base;
  const architecture = ARCHITECTURES.get(name ?? "");
  if (name === undefined || architecture === undefined) {
    const found = name === undefined ? "is not known" : `"${name}" is none whose names are known`;
    const known = [...ARCHITECTURES.keys()].join(", ");
    throw new AdapterError(
      `the base's architecture ${found}; expected one of ${known}. Give the base (--base, or base): its config.json or GGUF file`,
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
    ...marks,
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
    throw new AdapterError(
      `${name}: its ${out} rows are ordered by heads, and ${heads ?? "no"} heads are known; give the base`,
      {
        file: adapter.id,
        field: name,
      },
    );
  }
  // An embedding's A is [vocabulary, r], since its rows are looked up.
  const a = embedding ? transpose(A.values, rank, inputs) : A.values;
  const b = heads ? permuteRows(B.values, out, heads, "into pairs") : B.values;
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

/** A tensor of f32 to write. */
interface GgufEntry {
  readonly name: string;
  /** Row-major, as everywhere here; GGUF lists dimensions the other way round. */
  readonly shape: readonly number[];
  /** Little-endian f32. */
  readonly bytes: Uint8Array;
}

const ALIGNMENT = 32;
const [UINT32, FLOAT32, STRING] = [4, 6, 8];

/** Little-endian fields, one after another. */
class Fields {
  readonly #parts: Uint8Array[] = [];
  length = 0;

  #put(size: number, write: (view: DataView) => void): void {
    const bytes = new Uint8Array(size);
    write(new DataView(bytes.buffer));
    this.bytes(bytes);
  }

  bytes(bytes: Uint8Array): void {
    this.#parts.push(bytes);
    this.length += bytes.length;
  }

  u32(value: number): void {
    this.#put(4, (view) => view.setUint32(0, value, true));
  }

  u64(value: number): void {
    this.#put(8, (view) => view.setBigUint64(0, BigInt(value), true));
  }

  f32(value: number): void {
    this.#put(4, (view) => view.setFloat32(0, value, true));
  }

  text(value: string): void {
    const bytes = new TextEncoder().encode(value);
    this.u64(bytes.length);
    this.bytes(bytes);
  }

  done(): Uint8Array {
    const all = new Uint8Array(this.length);
    let at = 0;
    for (const part of this.#parts) {
      all.set(part, at);
      at += part.length;
    }
    return all;
  }
}

/**
 * The bytes of a GGUF file, chunk by chunk.
 * @param fields of the header: strings, and numbers, which are written as f32
 */
async function* writeGguf(
  fields: ReadonlyMap<string, string | number>,
  entries: readonly GgufEntry[],
): AsyncGenerator<Uint8Array, void> {
  const header = new Fields();
  header.bytes(new TextEncoder().encode("GGUF"));
  header.u32(3);
  header.u64(entries.length);
  header.u64(fields.size + 1);
  header.text("general.alignment");
  header.u32(UINT32);
  header.u32(ALIGNMENT);
  for (const [name, value] of fields) {
    header.text(name);
    header.u32(typeof value === "string" ? STRING : FLOAT32);
    if (typeof value === "string") header.text(value);
    else header.f32(value);
  }
  let offset = 0;
  for (const { name, shape, bytes } of entries) {
    header.text(name);
    header.u32(shape.length);
    for (const size of [...shape].reverse()) header.u64(size);
    header.u32(0);
    header.u64(offset);
    offset += bytes.length + padding(bytes.length);
  }
  header.bytes(new Uint8Array(padding(header.length)));
  yield header.done();
  for (const { bytes } of entries) {
    yield bytes;
    if (padding(bytes.length) > 0) yield new Uint8Array(padding(bytes.length));
  }
}

/** Bytes up to the next place where a tensor may begin. */
function padding(length: number): number {
  return (ALIGNMENT - (length % ALIGNMENT)) % ALIGNMENT;
}

// Writes a canonical adapter as an `.onnx_adapter` file of ONNX Runtime, for models that were exported with the factors of LoRA as
// inputs. Scales stay in B, since the format has none.

/**
 * Makes the bytes of an .onnx_adapter file (f32), chunk by chunk: `MODULE.lora_A.weight` [in, r] and `MODULE.lora_B.weight` [r, out].
 * Holds one adapter in memory.
 * @throws AdapterError for heads, biases, DoRA, convolutions and embeddings, which the format cannot hold
 */
export async function onnxAdapterFile(adapter: Exportable): Promise<AsyncIterable<Uint8Array>> {
  checkAdapter("onnxAdapterFile", adapter);
  refuseSaved(adapter, "an .onnx_adapter file");
  const entries: OnnxAdapterEntry[] = [];
  for (const module of adapter.modules.values()) {
    const { name, layout } = module;
    if (layout === "conv" || layout === "embedding")
      throw refuseModule(adapter, name, `is stored as ${layout}, which an .onnx_adapter file has no place for`);
    const { A, B, magnitude } = await factorsOf(module);
    if (magnitude)
      throw refuseModule(adapter, name, "has a magnitude (DoRA), which an .onnx_adapter file has no place for");
    entries.push(turned(`${name}.lora_A.weight`, A), turned(`${name}.lora_B.weight`, B));
  }
  return writeOnnxAdapter(entries);
}

function turned(name: string, { shape: [rows = 0, columns = 0], values }: FactorMatrix): OnnxAdapterEntry {
  return { name, shape: [columns, rows], bytes: f32Bytes(transpose(values, rows, columns)) };
}

// Writes `.onnx_adapter` files. Readers do without it.

/** A parameter of f32 to write. */
interface OnnxAdapterEntry {
  readonly name: string;
  readonly shape: readonly number[];
  /** Little-endian f32. */
  readonly bytes: Uint8Array;
}

const FLOAT = 1;
/** FlatBuffers have signed offsets of 32 bits. */
const MOST_BYTES = 2 ** 31 - 1;
/** Both tables have four fields of 4 bytes: bytes of the list of their places, and of a table with the way to that list. */
const [VTABLE, TABLE] = [12, 20];

const align = (at: number, to: number, rest = 0): number => at + ((((rest - at) % to) + to) % to);

/** Where everything lies: names and dimensions of the parameters, and their values. */
function layOut(entries: readonly OnnxAdapterEntry[], names: readonly Uint8Array[], start: number) {
  let at = start;
  // Elements of 8 bytes and values begin at a multiple of 8, behind a length of 4 bytes.
  const places = entries.map(({ shape }, i) => {
    const name = at;
    const dims = align(name + 4 + names[i]!.length + 1, 8, 4);
    at = align(dims + 4 + 8 * shape.length, 4);
    return { name, dims };
  });
  const values = entries.map(({ bytes }) => {
    const place = align(at, 8, 4);
    at = place + 4 + bytes.length;
    return place;
  });
  if (at > MOST_BYTES) throw new RangeError(`writeOnnxAdapter: ${at} bytes, ${MOST_BYTES} at most fit into the format`);
  return { places, values, end: at };
}

/**
 * The bytes of an adapter of ONNX Runtime, chunk by chunk: tables and names, then each parameter's values.
 * @throws RangeError when they take 2 GiB or more
 */
async function* writeOnnxAdapter(entries: readonly OnnxAdapterEntry[]): AsyncGenerator<Uint8Array, void> {
  const names = entries.map(({ name }) => new TextEncoder().encode(name));
  // Header, list of fields and table of the root; list of parameters; list of fields and tables of the parameters.
  const list = 8 + VTABLE + TABLE;
  const vtable = list + 4 + 4 * entries.length;
  const first = vtable + VTABLE;
  const { places, values, end } = layOut(entries, names, first + TABLE * entries.length);

  const head = new Uint8Array(values[0] ?? end);
  const view = new DataView(head.buffer);
  const u32 = (place: number, value: number): void => view.setUint32(place, value, true);
  const fields = (place: number): void => {
    for (const [i, value] of [VTABLE, TABLE, 4, 8, 12, 16].entries()) view.setUint16(place + 2 * i, value, true);
  };
  /** An offset is counted from where it stands. */
  const point = (place: number, to: number): void => u32(place, to - place);
  const root = 8 + VTABLE;
  point(0, root);
  for (let i = 0; i < 4; i++) head[4 + i] = IDENTIFIER.charCodeAt(i);
  fields(8);
  u32(root, VTABLE);
  for (const place of [4, 8, 12]) u32(root + place, 1);
  point(root + 16, list);
  u32(list, entries.length);
  fields(vtable);
  for (const [i, { shape }] of entries.entries()) {
    const table = first + TABLE * i;
    const { name, dims } = places[i]!;
    point(list + 4 + 4 * i, table);
    u32(table, table - vtable);
    point(table + 4, name);
    point(table + 8, dims);
    u32(table + 12, FLOAT);
    point(table + 16, values[i]!);
    u32(name, names[i]!.length);
    head.set(names[i]!, name + 4);
    u32(dims, shape.length);
    for (const [d, size] of shape.entries()) view.setBigUint64(dims + 4 + 8 * d, BigInt(size), true);
  }
  yield head;
  for (const [i, { bytes }] of entries.entries()) {
    const length = new Uint8Array(4);
    new DataView(length.buffer).setUint32(0, bytes.length, true);
    yield length;
    yield bytes;
    const next = values[i + 1];
    if (next !== undefined) yield new Uint8Array(next - (values[i]! + 4 + bytes.length));
  }
}

// Writes a canonical adapter with the same weights under the names of diffusers or of kohya. Scales stay in B: alpha equals the rank,
// which is what both assume where no alpha is given.

/**
 * Makes tensors of pytorch_lora_weights.safetensors (f32), as diffusers' `load_lora_weights` takes them. Holds one adapter in memory.
 * @throws AdapterError for heads, biases, embeddings, and modules without the name of a model of a pipeline
 */
export function diffusersFile(adapter: Exportable): Promise<SafetensorsEntry[]> {
  return tensorsOf(adapter, "diffusersFile", "a LoRA file of diffusers", (add, module, { A, B, magnitude }) => {
    add(`${module}.lora_A.weight`, A.shape, A.values);
    add(`${module}.lora_B.weight`, B.shape, B.values);
    // PEFT's shape for convolutions: [1, out, 1…].
    const ones = A.shape.slice(2).map(() => 1);
    if (magnitude)
      add(
        `${module}.lora_magnitude_vector`,
        ones.length > 0 ? [1, magnitude.length, ...ones] : [magnitude.length],
        magnitude,
      );
  });
}

/**
 * Makes tensors of a file as kohya's sd-scripts and LyCORIS save it (f32), with an alpha for every module. Holds one adapter in memory.
 * @throws AdapterError as `diffusersFile`
 */
export function kohyaFile(adapter: Exportable): Promise<SafetensorsEntry[]> {
  return tensorsOf(adapter, "kohyaFile", "a file of kohya", (add, module, { A, B, magnitude }) => {
    const name = flatten(module);
    if (name === undefined) throw refuseModule(adapter, module, "is of a model that kohya has no prefix for");
    add(`${name}.lora_down.weight`, A.shape, A.values);
    add(`${name}.lora_up.weight`, B.shape, B.values);
    add(`${name}.alpha`, [], Float32Array.of(A.shape[0]!));
    if (magnitude) add(`${name}.dora_scale`, [magnitude.length, ...A.shape.slice(1).map(() => 1)], magnitude);
  });
}

async function tensorsOf(
  adapter: Exportable,
  where: string,
  format: string,
  put: (add: Add, module: string, factors: AdapterFactors) => void,
): Promise<SafetensorsEntry[]> {
  checkAdapter(where, adapter);
  refuseSaved(adapter, format);
  const tensors: SafetensorsEntry[] = [];
  const add: Add = (name, shape, values) => {
    const bytes = f32Bytes(values);
    tensors.push({ name, dtype: "F32", shape: [...shape], read: () => bytes });
  };
  const bare = bareModel(adapter.modules.keys());
  for (const module of adapter.modules.values()) {
    const { name, layout } = module;
    if (layout === "embedding") throw refuseModule(adapter, name, `is an embedding, which ${format} has no place for`);
    if (prefixOf(name) === "" && bare === undefined)
      throw refuseModule(adapter, name, "does not begin with a model of a pipeline, such as unet or text_encoder");
    put(add, prefixOf(name) === "" ? `${bare}.${name}` : name, await factorsOf(module));
  }
  return tensors;
}
