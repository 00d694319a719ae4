/**
 * Reads an adapter as PEFT saves it, `adapter_config.json` and `adapter_model.safetensors`, into the canonical form.
 * Rank and scale of a module are those PEFT gives it, from the same fields and patterns. A file that PEFT would not
 * load, or would load in part only, is refused. Portable: folders are read in folder.ts.
 */
import { AdapterError } from "../errors.ts";
import type { Layout, TaskMetadata } from "../format/format.ts";
import type { ByteSource } from "../source.ts";
import { isFloatDtype, openSafetensors, type SafetensorsFile } from "../tensor/safetensors.ts";
import type { Adapter, AdapterModule, SavedTensor } from "./adapter.ts";
import { readTaskMetadata } from "./metadata.ts";
import { type PeftConfig, readPeftConfig } from "./peft-config.ts";
import { type KeyRole, parsePeftKeys } from "./peft-keys.ts";

/** The files of one PEFT adapter. */
export interface PeftFiles {
  /** Task id. */
  id: string;
  /** The adapter's folder, for messages. */
  file: string;
  /** Parsed adapter_config.json. */
  config: unknown;
  /** adapter_model.safetensors. Closed by the adapter's `close`. */
  tensors: ByteSource;
  /** Parsed task.json, where there is one. */
  task?: unknown;
}

/**
 * Opens an adapter: checks its configuration and the names, shapes and dtypes of all tensors. Values are read, and
 * checked, when a module's or saved tensor's `read` is called.
 * @throws AdapterError naming the configuration field or tensor that cannot be represented, and what to do
 * @throws FormatError when the tensor file breaks the safetensors format; SourceError when it cannot be read
 */
export async function readPeft({ id, file, config: json, tensors: source, task }: PeftFiles): Promise<Adapter> {
  const config = readPeftConfig(json, `${file}/adapter_config.json`);
  const metadata = readTaskMetadata(task, `${file}/task.json`);
  const tensors = await openSafetensors(source);
  const { modules, saved, warnings } = assemble(tensors, config);
  return {
    id,
    file,
    byteLength: tensors.byteLength,
    baseModel: config.baseModel,
    modules,
    saved,
    metadata: withIdentity(metadata, config),
    warnings: [...config.warnings, ...warnings],
    close: async () => source.close?.(),
  };
}

function withIdentity(metadata: TaskMetadata, config: PeftConfig): TaskMetadata {
  return {
    ...metadata,
    ...(config.taskType !== undefined && { task_type: config.taskType }),
    ...(config.revision !== undefined && { revision: config.revision }),
  };
}

/**
 * Embeddings and heads, by the last part of their name, that PEFT saves whole of its own accord when the vocabulary was
 * resized (`save_embedding_layers`). The configuration does not list them.
 */
const EMBEDDINGS =
  /(^|\.)(embed_tokens|lm_head|word_embeddings|shared|wte|embed_in|embed_out|tok_embeddings)\.(weight|bias)$/;

/** What makes a module an adapted one. */
const FACTORS: readonly KeyRole[] = ["A", "B", "embeddingA", "embeddingB"];

/** Where each tensor of a file belongs: its key by the name of the module or parameter. */
interface Places {
  /** Tensors of adapted modules. */
  parts: Map<string, Map<KeyRole, string>>;
  /** Replaced rows, by module. */
  rows: Map<string, string>;
  /** Whole parameters. */
  whole: Map<string, string>;
  biases: Map<string, string>;
  warnings: string[];
}

type Refuse = (field: string, message: string) => AdapterError;

/** Gives every tensor of the file its place. @throws AdapterError naming those that have none */
function place(tensors: SafetensorsFile, config: PeftConfig, refuse: Refuse): Places {
  const parts = new Map<string, Map<KeyRole, string>>();
  const rows = new Map<string, string>();
  const whole = new Map<string, string>();
  const wrapped = new Map<string, string>();
  const biases = new Map<string, string>();
  const leftover: string[] = [];
  const unlisted: string[] = [];
  const copies: string[] = [];

  /** Two spellings of one tensor, with and without prefix or adapter name, are two adapters in one file. */
  const put = <K extends string>(map: Map<K, string>, name: K, key: string): void => {
    const other = map.get(name);
    if (other !== undefined) {
      throw refuse(key, `tensors ${other} and ${key} are the same one of two adapters; save one adapter at a time`);
    }
    map.set(name, key);
  };

  for (const [key, parsed] of parsePeftKeys(tensors.tensors.keys())) {
    const { dtype } = tensors.tensors.get(key)!;
    if (!isFloatDtype(dtype)) {
      throw refuse(key, `tensor ${key} is ${dtype}, expected F32, F16, BF16 or F64; save the adapter in one of these`);
    }
    if (parsed.kind === "part") {
      const { module, part } = parsed;
      if (!parts.has(module)) parts.set(module, new Map());
      put(parts.get(module)!, part, key);
    } else if (parsed.kind === "rows") put(rows, parsed.module, key);
    else if (parsed.kind === "unknown") leftover.push(key);
    else {
      const { kind, parameter } = parsed;
      if (isSaved(parameter, config.modulesToSave)) {
        if (kind !== "original") put(kind === "plain" ? whole : wrapped, parameter, key);
      } else if (kind !== "plain") leftover.push(key);
      else if (config.bias !== "none" && /(^|\.)bias$/.test(parameter)) put(biases, parameter, key);
      // Earlier versions of PEFT saved whatever had "bias" in its name, such as T5's relative_attention_bias.weight.
      else if (config.bias === "all" && parameter.includes("bias")) put(whole, parameter, key);
      else if (EMBEDDINGS.test(parameter)) {
        unlisted.push(key);
        put(whole, parameter, key);
      } else leftover.push(key);
    }
  }
  for (const [parameter, key] of wrapped) if (!whole.has(parameter)) whole.set(parameter, key);

  for (const [module, keys] of parts) {
    const [weight, bias] = [keys.get("baseWeight"), keys.get("baseBias")];
    const adapted = FACTORS.some((part) => keys.has(part));
    if (weight !== undefined) (adapted ? copies : leftover).push(weight);
    if (bias !== undefined) {
      if (config.bias !== "none") put(biases, `${module}.bias`, bias);
      else (adapted && weight !== undefined ? copies : leftover).push(bias);
    }
    if (adapted) continue;
    for (const [part, key] of keys) if (part === "magnitude" || part === "loraBias") leftover.push(key);
    parts.delete(module);
  }
  if (leftover.length > 0) throw leftoverError(leftover, refuse);

  const warnings: string[] = [];
  if (copies.length > 0) {
    warnings.push(
      `${copies.join(", ")}: copies of the base's own weights, not used. If the vocabulary was resized before ` +
        "training, use the adapter with that resized base",
    );
  }
  if (unlisted.length > 0) {
    warnings.push(`${unlisted.join(", ")}: not in modules_to_save, but replaces the base's whole, as in PEFT`);
  }
  return { parts, rows, whole, biases, warnings };
}

/** PEFT wraps every module whose name ends with an entry, not only at a dot (`_set_trainable`). */
function isSaved(parameter: string, modulesToSave: readonly string[]): boolean {
  for (let dot = parameter.indexOf("."); dot >= 0; dot = parameter.indexOf(".", dot + 1)) {
    const module = parameter.slice(0, dot);
    if (modulesToSave.some((name) => module.endsWith(name))) return true;
  }
  return false;
}

function leftoverError(keys: readonly string[], refuse: Refuse): AdapterError {
  const attention = keys.find((key) => key.includes(".base_layer.out_proj.lora_"));
  if (attention !== undefined) {
    return refuse(
      "target_modules",
      `target_modules adapts a torch.nn.MultiheadAttention (${attention}), whose weights have names of their own: ` +
        "not supported. Adapt other modules",
    );
  }
  const shown = keys.slice(0, 5).join(", ") + (keys.length > 5 ? `, and ${keys.length - 5} more` : "");
  return refuse(
    keys[0]!,
    `nothing in adapter_config.json accounts for ${shown}. List the module in modules_to_save if it replaces the ` +
      "base's, set bias if these are trained biases, or remove the tensors",
  );
}

/** Makes modules and saved tensors of a file. */
function assemble(
  tensors: SafetensorsFile,
  config: PeftConfig,
): { modules: Map<string, AdapterModule>; saved: SavedTensor[]; warnings: string[] } {
  const refuse: Refuse = (field, message) => new AdapterError(message, { file: tensors.name, field });
  const places = place(tensors, config, refuse);
  const modules = new Map<string, AdapterModule>();
  for (const [name, keys] of [...places.parts].sort(([a], [b]) => (a < b ? -1 : 1))) {
    const whole = places.whole.get(`${name}.weight`) ?? places.rows.get(name);
    if (whole !== undefined) {
      throw refuse(whole, `${whole} replaces weights of ${name}, which is also adapted; save the adapter again`);
    }
    modules.set(name, readModule(name, keys, tensors, config));
  }
  if (modules.size === 0) {
    throw new AdapterError("holds no lora_A and lora_B; expected what PEFT's save_pretrained writes", {
      file: tensors.name,
    });
  }
  const saved = [
    ...savedBiases(places, modules, tensors, config, refuse),
    ...savedRows(places, tensors, config, refuse),
  ];
  for (const [name, key] of places.whole) {
    saved.push({ name, role: "saved", shape: shapeOf(tensors, key), read: () => readFinite(tensors, key, 1) });
  }
  saved.sort((a, b) => (a.name < b.name ? -1 : 1));
  return { modules, saved, warnings: places.warnings };
}

function shapeOf(tensors: SafetensorsFile, key: string): readonly number[] {
  return tensors.tensors.get(key)!.shape;
}

function describe(tensors: SafetensorsFile, key: string): string {
  return `${key} is [${shapeOf(tensors, key).join(", ")}]`;
}

/** Replaced biases, and those that `lora_bias` adds. One bias that is both is read as their sum. */
function savedBiases(
  { parts, biases }: Places,
  modules: ReadonlyMap<string, AdapterModule>,
  tensors: SafetensorsFile,
  config: PeftConfig,
  refuse: Refuse,
): SavedTensor[] {
  const saved: SavedTensor[] = [];
  for (const [module, { out }] of modules) {
    const name = `${module}.bias`;
    const whole = biases.get(name);
    if (whole !== undefined && shapeOf(tensors, whole).join() !== String(out)) {
      throw refuse(whole, `${describe(tensors, whole)}, expected [${out}]; save the adapter again`);
    }
    const delta = parts.get(module)!.get("loraBias");
    if (delta === undefined) continue;
    const { scale } = config.forModule(module);
    const readDelta = (): Promise<Float32Array> => readFinite(tensors, delta, scale);
    const readSum = async (): Promise<Float32Array> => {
      const bias = await readFinite(tensors, whole!, 1);
      const added = await readDelta();
      return bias.map((value, i) => value + added[i]!);
    };
    if (whole === undefined) saved.push({ name, role: "bias-delta", shape: [out], read: readDelta });
    else saved.push({ name, role: "bias", shape: [out], read: readSum });
  }
  const summed = new Set(saved.map(({ name }) => name));
  for (const [name, key] of biases) {
    if (summed.has(name)) continue;
    saved.push({ name, role: "bias", shape: shapeOf(tensors, key), read: () => readFinite(tensors, key, 1) });
  }
  return saved;
}

/**
 * Rows of embeddings. Despite its name, `trainable_tokens_delta` holds the new rows themselves (peft's
 * tuners/trainable_tokens/layer.py copies them in).
 */
function savedRows({ rows }: Places, tensors: SafetensorsFile, config: PeftConfig, refuse: Refuse): SavedTensor[] {
  if (config.tokenRows.length > 0 && rows.size === 0) {
    throw refuse(
      "trainable_token_indices",
      "trainable_token_indices is set, but there is no trainable_tokens_delta; save the adapter again",
    );
  }
  return [...rows].map(([module, key]) => {
    const shape = shapeOf(tensors, key);
    const indices = config.tokenRows.find(([ending]) => module.endsWith(ending))?.[1];
    if (indices === undefined || shape.length !== 2 || shape[0] !== indices.length) {
      throw refuse(
        "trainable_token_indices",
        `${describe(tensors, key)}, but trainable_token_indices names ${indices?.length ?? "no"} rows ` +
          `of ${module}; take the adapter_config.json that was saved with it`,
      );
    }
    return { name: `${module}.weight`, role: "rows", shape, indices, read: () => readFinite(tensors, key, 1) };
  });
}

/** One adapted module. @throws AdapterError when its tensors do not fit each other or the configuration */
function readModule(
  name: string,
  keys: ReadonlyMap<KeyRole, string>,
  tensors: SafetensorsFile,
  config: PeftConfig,
): AdapterModule {
  const refuse: Refuse = (field, message) =>
    new AdapterError(`module ${name}: ${message}`, { file: tensors.name, field });

  const embedding = keys.has("embeddingA") || keys.has("embeddingB");
  if (embedding && (keys.has("A") || keys.has("B"))) {
    throw refuse(name, "has both lora_A or lora_B and lora_embedding_A or lora_embedding_B; save the adapter again");
  }
  const keyA = keys.get(embedding ? "embeddingA" : "A");
  const keyB = keys.get(embedding ? "embeddingB" : "B");
  if (keyA === undefined || keyB === undefined) {
    const [one, other] = keyA === undefined ? [keyB!, "A"] : [keyA, "B"];
    throw refuse(one, `has ${one} but no factor ${other}; save the adapter again`);
  }

  const shapeA = shapeOf(tensors, keyA);
  const shapeB = shapeOf(tensors, keyB);
  const found = `${describe(tensors, keyA)} and ${describe(tensors, keyB)}`;
  const [rank = 0, inputs = 0, ...kernel] = shapeA;
  const [out = 0, rankB = 0, ...ones] = shapeB;
  if ([...shapeA, ...shapeB].includes(0) || shapeA.length < 2 || shapeB.length < 2) {
    throw refuse(keyA, `${found}: incomplete, as when DeepSpeed or FSDP shards are not gathered; save it again`);
  }
  if (kernel.length !== ones.length || kernel.length > (embedding ? 0 : 3) || ones.some((size) => size !== 1)) {
    throw refuse(keyA, `${found}; expected [r, in] and [out, r], or [r, in, k…] and [out, r, 1…]; save it again`);
  }
  if (rank !== rankB) {
    if (kernel.length > 0 && rank % rankB === 0) {
      throw refuse(
        keyB,
        `${found}: a grouped convolution (${rank / rankB} groups). PEFT's update mixes the groups, which the base ` +
          "weight cannot hold (PEFT cannot merge it either); leave this module out of target_modules",
      );
    }
    throw refuse(keyB, `${found}: ranks ${rank} and ${rankB} differ; the files of two adapters are mixed`);
  }

  const { rank: expected, scale } = config.forModule(name);
  if (rank !== expected) {
    throw refuse(
      "r",
      `r and rank_pattern give rank ${expected}, but ${keyA} has ${rank}. PEFT refuses this file too, and its scale ` +
        "is uncertain: set r or rank_pattern in adapter_config.json to what it was trained with",
    );
  }

  const magnitude = keys.get("magnitude");
  if (config.dora !== (magnitude !== undefined)) {
    const what = magnitude ?? "no lora_magnitude_vector";
    throw refuse("use_dora", `use_dora is ${config.dora}, but the file has ${what}; save the adapter again`);
  }
  if (magnitude !== undefined) {
    const shape = shapeOf(tensors, magnitude);
    // [out], or [1, out, 1…] for convolutions.
    if (shape[shape.length > 1 ? 1 : 0] !== out || shape.reduce((a, b) => a * b, 1) !== out) {
      throw refuse(magnitude, `${describe(tensors, magnitude)}, expected [${out}]; save the adapter again`);
    }
  }
  const loraBias = keys.get("loraBias");
  if (config.loraBias !== (loraBias !== undefined)) {
    const what = loraBias ?? "no lora_B.bias";
    throw refuse("lora_bias", `lora_bias is ${config.loraBias}, but the file has ${what}; save the adapter again`);
  }
  if (loraBias !== undefined && shapeOf(tensors, loraBias).join() !== String(out)) {
    throw refuse(loraBias, `${describe(tensors, loraBias)}, expected [${out}]; save the adapter again`);
  }

  let layout: Layout = config.fanInFanOut ? "in-out" : "out-in";
  if (embedding) layout = "embedding";
  else if (kernel.length > 0) layout = "conv";
  return {
    name,
    out,
    in: kernel.reduce((a, b) => a * b, inputs),
    rank,
    layout,
    ...(kernel.length > 0 && { kernel }),
    async read() {
      const A = await readFinite(tensors, keyA, 1);
      const Bt = transpose(await readFinite(tensors, keyB, scale), out, rank);
      if (magnitude === undefined) return { A, Bt };
      return { A, Bt, magnitude: await readFinite(tensors, magnitude, 1) };
    },
  };
}

/** Values times `scale`, all finite. */
async function readFinite(tensors: SafetensorsFile, key: string, scale: number): Promise<Float32Array<ArrayBuffer>> {
  const values = await tensors.readF32(key);
  for (let i = 0; i < values.length; i++) {
    values[i]! *= scale;
    if (!Number.isFinite(values[i])) {
      const { shape } = tensors.tensors.get(key)!;
      const scaled = scale === 1 ? "" : ` times the scale ${scale}`;
      throw new AdapterError(
        `tensor ${key} [${shape.join(", ")}]: element ${i}${scaled} is ${values[i]}. Training diverged or the file ` +
          "is damaged; take an earlier checkpoint",
        { file: tensors.name, field: key },
      );
    }
  }
  return values;
}

/** [rows, columns] → [columns, rows]. */
function transpose(values: Float32Array, rows: number, columns: number): Float32Array<ArrayBuffer> {
  const out = new Float32Array(values.length);
  for (let i = 0; i < rows; i++) for (let j = 0; j < columns; j++) out[j * rows + i] = values[i * columns + j]!;
  return out;
}
