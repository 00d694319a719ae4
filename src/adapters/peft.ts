/**
 * Reads an adapter as PEFT saves it, `adapter_config.json` and `adapter_model.safetensors`, into the canonical form.
 * Rank and scale of a module come from the same fields and patterns as in PEFT. A file that PEFT would not load, or
 * would load in part only, is refused. Portable: folders are read in folder.ts.
 */

import type { BaseInput, WeightHost } from "../core/base.ts";
import { openHost } from "../core/open-base.ts";
import { AdapterError, checkOptions, listed } from "../errors.ts";
import { isHead, type Layout, type TaskMetadata } from "../format/format.ts";
import { elementsOf } from "../tensor/dtypes.ts";
import { isFloatDtype, type SafetensorsEntry, show, type TensorFile } from "../tensor/safetensors.ts";
import { type Term, transpose } from "../tensor/term.ts";
import {
  type Adapter,
  type AdapterFile,
  type AdapterModule,
  type Add,
  checkAdapter,
  compare,
  type Exportable,
  f32Entry,
  factorsOf,
  openSafetensors,
  rankOf,
  readAdapterFile,
  refuseBoth,
  type SavedTensor,
} from "./adapter.ts";
import { CONVERT, headsOf, type PeftConfig, readPeftConfig, withoutBase } from "./peft-config.ts";
import type { BaseStart } from "./start.ts";

/**
 * The files of one adapter of PEFT, with adapter_model.safetensors as its tensors, or of MLX LM, with
 * adapters.safetensors.
 */
export interface PeftFiles extends AdapterFile {
  /** Parsed adapter_config.json. */
  readonly config: unknown;
  /**
   * Weights of the base model, for an adapter that began as PiSSA or OLoRA: ΔW then is relative to these. A host is the
   * caller's to close, after the adapter. Default: none; such an adapter is refused.
   */
  readonly base?: BaseInput | undefined;
}

/**
 * Opens an adapter: checks its configuration and the names, shapes and dtypes of all tensors. Values are read, and
 * checked, when a module's or saved tensor's `read` is called.
 * @throws AdapterError naming the configuration field or tensor that cannot be represented, and what to do
 * @throws FormatError when the tensor file breaks the safetensors format; SourceError when it cannot be read
 * @example
 * const at = "https://example.org/adapters/sst2";
 * const config = await (await fetch(`${at}/adapter_config.json`)).json();
 * const adapter = await readPeft({ id: "sst2", file: at, config, tensors: `${at}/adapter_model.safetensors` });
 */
export async function readPeft(files: PeftFiles): Promise<Adapter> {
  checkOptions("readPeft", files, ["id", "file", "config", "tensors", "task", "base"]);
  const { config: json, base: given, ...others } = files;
  const config = readPeftConfig(json, `${files.file}/adapter_config.json`);
  const base = config.start && given !== undefined ? await openHost(given) : undefined;
  const close = async (): Promise<void> => (base === given ? undefined : base?.close?.());
  try {
    const adapter = await readAdapterFile(others, openSafetensors, (tensors, metadata) => {
      const { modules, saved, warnings } = assemble(peftTensors(tensors, config, base), config);
      return {
        modules,
        saved,
        baseModel: config.baseModel,
        metadata: withIdentity(metadata, config),
        warnings: [...warnings, ...tieWarnings([...modules.keys()], saved)],
      };
    });
    return base === undefined ? adapter : { ...adapter, close: () => adapter.close().then(close) };
  } catch (error) {
    await close();
    throw error;
  }
}

/** Embeddings that heads are tied to in many language models, and the heads, by the last part of their name. */
const TIED = /(^|\.)(embed_tokens|wte|shared|embed_in)$/;
const HEADS = /(^|\.)(lm_head|embed_out)$/;

/**
 * Warns of an embedding that changes without its head. PEFT leaves a tied head as it was then, which one weight for
 * both cannot do.
 */
function tieWarnings(modules: readonly string[], saved: readonly SavedTensor[]): string[] {
  const whole = saved.flatMap(({ name, role }) => (role === "saved" ? name.replace(/\.weight$/, "") : []));
  const changed = [...modules, ...whole];
  const embedding = changed.find((name) => TIED.test(name));
  if (embedding === undefined || changed.some((name) => HEADS.test(name))) return [];
  return [
    `${embedding} changes, and no head with it: PEFT leaves a head that is tied to it as it was. Where the base has one weight for both, ` +
      "give the head one of its own",
  ];
}

function withIdentity(metadata: TaskMetadata, config: PeftConfig): TaskMetadata {
  return {
    ...metadata,
    ...(config.taskType !== undefined && { task_type: config.taskType }),
    ...(config.revision !== undefined && { revision: config.revision }),
  };
}

function assemble(tensors: PeftTensors, config: PeftConfig): Pick<Adapter, "modules" | "saved" | "warnings"> {
  const { refuse, shape, read, file } = tensors;
  const { parts, rows, whole, biases, warnings } = place(tensors, config);
  const modules = new Map<string, AdapterModule>();
  for (const [name, keys] of [...parts].sort(([a], [b]) => compare(a, b))) {
    const replaced = whole.get(`${name}.weight`) ?? rows.get(name);
    if (replaced !== undefined)
      throw refuse(replaced, `${replaced} replaces weights of ${name}, which is also adapted; save the adapter again`);
    modules.set(name, readModule(name, keys, tensors));
  }
  if (modules.size === 0)
    throw new AdapterError("holds no lora_A and lora_B; expected what PEFT's save_pretrained writes", {
      file: file.name,
    });
  const saved = [
    ...savedBiases(biases, parts, modules, tensors),
    ...savedRows(rows, tensors, config),
    ...[...whole].map(
      ([name, key]): SavedTensor => ({ name, role: "saved", shape: shape(key), read: () => read(key) }),
    ),
  ].sort((a, b) => compare(a.name, b.name));
  for (const tensor of saved) checkShape(tensor, refuse);
  return { modules, saved, warnings };
}

/** @throws AdapterError for a shape that a pack cannot hold (SPEC.md, section 6.2) */
function checkShape({ name, role, shape }: SavedTensor, refuse: PeftTensors["refuse"]): void {
  const [most, expected] = role === "bias" ? [1, "one dimension"] : [8, "1 to 8 dimensions"];
  if (shape.length > 0 && shape.length <= most && !shape.includes(0)) return;
  throw refuse(name, `${name} is [${shape.join(", ")}], expected ${expected} of at least 1; save the adapter again`);
}

/** Replaced biases, and those that `lora_bias` adds. A bias that is both is read as their sum. */
function savedBiases(
  biases: ReadonlyMap<string, string>,
  parts: Places["parts"],
  modules: ReadonlyMap<string, AdapterModule>,
  { config, shape, describe, refuse, read }: PeftTensors,
): Iterable<SavedTensor> {
  const saved = new Map<string, SavedTensor>();
  for (const [name, key] of biases) saved.set(name, { name, role: "bias", shape: shape(key), read: () => read(key) });
  for (const [module, { out }] of modules) {
    const name = `${module}.bias`;
    const whole = saved.get(name);
    if (whole && whole.shape.join() !== String(out)) {
      const key = biases.get(name)!;
      throw refuse(key, `${describe(key)}, expected [${out}]; save the adapter again`);
    }
    const delta = parts.get(module)!.get("loraBias");
    if (delta === undefined) continue;
    const readDelta = (): Promise<Float32Array> => read(delta, config.forModule(module).scale);
    const readSum = async (): Promise<Float32Array> => {
      const bias = await whole!.read();
      const added = await readDelta();
      return bias.map((value, i) => value + added[i]!);
    };
    saved.set(name, whole ? { ...whole, read: readSum } : { name, role: "bias-delta", shape: [out], read: readDelta });
  }
  return saved.values();
}

/**
 * Rows of embeddings. Despite its name, `trainable_tokens_delta` holds the new rows themselves (peft's
 * tuners/trainable_tokens/layer.py copies them in).
 */
function savedRows(
  rows: ReadonlyMap<string, string>,
  { shape, describe, refuse, read }: PeftTensors,
  config: PeftConfig,
): SavedTensor[] {
  if (config.tokenRows.length > 0 && rows.size === 0) {
    throw refuse(
      "trainable_token_indices",
      "trainable_token_indices is set, but there is no trainable_tokens_delta; save the adapter again",
    );
  }
  return [...rows].map(([module, key]) => {
    const found = shape(key);
    const indices = config.tokenRows.find(([ending]) => module.endsWith(ending))?.[1];
    if (indices === undefined || found.length !== 2 || found[0] !== indices.length) {
      throw refuse(
        "trainable_token_indices",
        `${describe(key)}, but trainable_token_indices names ${indices?.length ?? "no"} rows ` +
          `of ${module}; take the adapter_config.json that was saved with it`,
      );
    }
    return { name: `${module}.weight`, role: "rows", shape: found, indices, read: () => read(key) };
  });
}

// One adapted module of a PEFT file: its tensors must fit each other and the configuration.

/** @throws AdapterError when its tensors do not fit each other or the configuration */
export function readModule(name: string, keys: ReadonlyMap<KeyRole, string>, given: PeftTensors): AdapterModule {
  const tensors: PeftTensors = {
    ...given,
    refuse: (field, message) => given.refuse(field, `module ${name}: ${message}`),
  };
  const { config, read } = tensors;
  const factors = factorKeys(name, keys, tensors);
  const { keyA, keyB, embedding } = factors;
  const { rank, inputs, out, kernel } = checkedShapes(factors, tensors);
  const { rank: expected, scale } = config.forModule(name);
  if (rank !== expected) {
    throw tensors.refuse(
      "r",
      `r and rank_pattern give rank ${expected}, but ${keyA} has ${rank}. PEFT refuses this file too, and its scale ` +
        "is uncertain: set r or rank_pattern in the configuration to what it was trained with",
    );
  }
  const magnitude = keys.get("magnitude");
  checkExtra(tensors, "use_dora", config.dora, "lora_magnitude_vector", magnitude, out);
  checkExtra(tensors, "lora_bias", config.loraBias, "lora_B.bias", keys.get("loraBias"), out);

  const layout: Layout = embedding
    ? "embedding"
    : kernel.length > 0
      ? "conv"
      : config.fanInFanOut
        ? "in-out"
        : "out-in";
  const module: AdapterModule = {
    name,
    out,
    in: inputs * elementsOf(kernel),
    rank,
    layout,
    ...(kernel.length > 0 && { kernel }),
    async read() {
      const A = await read(keyA);
      const Bt = transpose(await read(keyB, scale), out, rank);
      return { rank, A, Bt, magnitude: magnitude === undefined ? undefined : await read(magnitude) };
    },
  };
  // Embeddings begin as they are, whatever the start of linear layers.
  return config.start === undefined || embedding ? module : started(module, config.start, scale, tensors);
}

/** The module relative to the base as it was before training. */
function started(
  module: AdapterModule,
  start: BaseStart,
  scale: number,
  { base, file, refuse }: PeftTensors,
): AdapterModule {
  if (module.layout === "conv") throw refuse("init_lora_weights", `init_lora_weights is "${start}", for a convolution`);
  if (base === undefined) {
    const advice = `Give the base's weights, as \`base\`. Or: ${CONVERT}`;
    throw refuse("init_lora_weights", `${withoutBase(start)}. ${advice}`);
  }
  const rank = module.rank + Math.min(module.rank, module.in, module.out);
  const read = async (): Promise<Term> =>
    (await import("./start.ts")).fromBase(start, module, await module.read(), scale, base, file.name);
  return { ...module, rank, read };
}

/** Largest rank and kernel that a pack holds. */
const MAX_SIZE = 65_535;

interface FactorKeys {
  readonly keyA: string;
  readonly keyB: string;
  readonly embedding: boolean;
}

function factorKeys(name: string, keys: ReadonlyMap<KeyRole, string>, { refuse }: PeftTensors): FactorKeys {
  const embedding = keys.has("embeddingA") || keys.has("embeddingB");
  if (embedding && (keys.has("A") || keys.has("B"))) {
    throw refuse(name, "has both lora_A or lora_B and lora_embedding_A or lora_embedding_B; save the adapter again");
  }
  const keyA = keys.get(embedding ? "embeddingA" : "A");
  const keyB = keys.get(embedding ? "embeddingB" : "B");
  if (keyA !== undefined && keyB !== undefined) return { keyA, keyB, embedding };
  const [one, other] = keyA === undefined ? [keyB!, "A"] : [keyA, "B"];
  throw refuse(one, `has ${one} but no factor ${other}; save the adapter again`);
}

function checkedShapes(
  { keyA, keyB, embedding }: FactorKeys,
  { shape, describe, refuse }: PeftTensors,
): { rank: number; inputs: number; out: number; kernel: readonly number[] } {
  const [shapeA, shapeB] = [shape(keyA), shape(keyB)];
  const found = `${describe(keyA)} and ${describe(keyB)}`;
  const [rank = 0, inputs = 0, ...kernel] = shapeA;
  const [out = 0, rankB = 0, ...ones] = shapeB;
  if ([...shapeA, ...shapeB].includes(0) || shapeA.length < 2 || shapeB.length < 2) {
    throw refuse(keyA, `${found}: incomplete, as when DeepSpeed or FSDP shards are not gathered; save it again`);
  }
  if (kernel.length !== ones.length || kernel.length > (embedding ? 0 : 3) || ones.some((size) => size !== 1)) {
    throw refuse(keyA, `${found}; expected [r, in] and [out, r], or [r, in, k…] and [out, r, 1…]; save it again`);
  }
  if (Math.max(rank, ...kernel) > MAX_SIZE) {
    throw refuse(keyA, `${found}: rank and kernel are ${MAX_SIZE} at most (SPEC.md, sections 4.2 and 6.1)`);
  }
  if (rank !== rankB && kernel.length > 0 && rank % rankB === 0) {
    throw refuse(
      keyB,
      `${found}: a grouped convolution (${rank / rankB} groups). PEFT's update mixes the groups, which the base ` +
        "weight cannot hold (PEFT cannot merge it either); leave this module out of target_modules",
    );
  }
  if (rank !== rankB)
    throw refuse(keyB, `${found}: ranks ${rank} and ${rankB} differ; the files of two adapters are mixed`);
  return { rank, inputs, out, kernel };
}

/**
 * Checks a vector [out] that a module has if a field of the configuration is set; magnitudes of convolutions are [1,
 * out, 1…].
 */
function checkExtra(
  { refuse, shape, describe }: PeftTensors,
  field: "use_dora" | "lora_bias",
  set: boolean,
  what: string,
  key: string | undefined,
  out: number,
): void {
  if (set !== (key !== undefined))
    throw refuse(field, `${field} is ${set}, but the file has ${key ?? `no ${what}`}; save the adapter again`);
  if (key === undefined) return;
  const found = shape(key);
  const at = field === "use_dora" && found.length > 1 ? 1 : 0;
  if (found[at] === out && elementsOf(found) === out && (at > 0 || found.length === 1)) return;
  throw refuse(key, `${describe(key)}, expected [${out}]; save the adapter again`);
}

// Assigns every tensor of a PEFT file to its module or parameter; a file with a tensor left over is refused. Reads no
// values.

/** The part of a configuration that decides how a module is read. */
type ModuleConfig = Pick<PeftConfig, "fanInFanOut" | "loraBias" | "dora" | "start" | "forModule">;

/** A tensor file, its configuration, and what every check of them needs. */
export interface PeftTensors {
  readonly file: TensorFile;
  readonly config: ModuleConfig;
  /** The base, where it was given and the adapter's training began from a changed one. */
  readonly base?: WeightHost | undefined;
  shape(key: string): readonly number[];
  /** "KEY is [SHAPE]". */
  describe(key: string): string;
  /** Makes an error that names the file, and the tensor or field at fault. */
  refuse(field: string, message: string): AdapterError;
  /** Values times `scale`. @throws AdapterError when one is not finite */
  read(key: string, scale?: number): Promise<Float32Array<ArrayBuffer>>;
}

export const refuser =
  ({ name: file }: Pick<TensorFile, "name">): PeftTensors["refuse"] =>
  (field, message) =>
    new AdapterError(message, { file, field });

export function peftTensors(file: TensorFile, config: ModuleConfig, base?: WeightHost): PeftTensors {
  const shape = (key: string): readonly number[] => file.tensors.get(key)!.shape;
  const refuse = refuser(file);
  return {
    file,
    config,
    base,
    shape,
    describe: (key) => `${key} is [${shape(key).join(", ")}]`,
    refuse,
    async read(key, scale = 1) {
      const values = await file.readF32(key);
      const i = multiplied(values, scale);
      if (i === values.length) return values;
      const scaled = scale === 1 ? "" : ` times the scale ${scale}`;
      throw refuse(
        key,
        `tensor ${key} [${shape(key).join(", ")}]: element ${i}${scaled} is ${values[i]}. Training diverged or the file ` +
          "is damaged; take an earlier checkpoint",
      );
    },
  };
}

/**
 * Multiplies values in place until one is not finite. Returns how many are. Loops of an async function are compiled
 * late.
 */
function multiplied(values: Float32Array, scale: number): number {
  let i = 0;
  for (; i < values.length; i++) {
    values[i] = values[i]! * scale;
    if (!Number.isFinite(values[i])) break;
  }
  return i;
}

/** Keys of a file's tensors by the name of the module or parameter. */
interface Places {
  /** Tensors of adapted modules. */
  readonly parts: Map<string, Map<KeyRole, string>>;
  /** Replaced rows, by module. */
  readonly rows: Map<string, string>;
  /** Whole parameters. */
  readonly whole: Map<string, string>;
  readonly biases: Map<string, string>;
  readonly warnings: string[];
}

/** Longest name in a pack (SPEC.md, sections 4.2 and 6.2); it is never longer than the tensor's name. */
const MAX_NAME_BYTES = 1024;

/** Assigns every tensor of the file. @throws AdapterError naming those that fit nowhere */
function place({ file, refuse }: PeftTensors, config: PeftConfig): Places {
  const parts: Places["parts"] = new Map();
  const rows = new Map<string, string>();
  const whole = new Map<string, string>();
  const wrapped = new Map<string, string>();
  const biases = new Map<string, string>();
  const leftover: string[] = [];
  const unlisted: string[] = [];
  /**
   * Adds a key. Two spellings of one tensor, with and without prefix or adapter name, mean two adapters in one file.
   */
  const put = <K extends string>(map: Map<K, string>, name: K, key: string): void => {
    const other = map.get(name);
    if (other !== undefined) throw twice(other, key, refuse);
    map.set(name, key);
  };
  for (const key of file.tensors.keys()) checkName(key, refuse);
  const adapters = adapterNames(file.tensors.keys());
  for (const [key, { dtype }] of file.tensors) {
    checkFloats(key, dtype, refuse);
    const parsed = parsePeftKey(key, adapters);
    const where = parsed && placeOf(parsed, config);
    if (!parsed || where === undefined) leftover.push(key);
    else if (where === "part") {
      const keys = parts.get(parsed.name) ?? new Map<KeyRole, string>();
      parts.set(parsed.name, keys);
      put(keys, parsed.part!, key);
    } else if (where === "unlisted") {
      put(whole, parsed.name, key);
      unlisted.push(key);
    } else if (where !== "unused") put({ rows, whole, wrapped, biases }[where], parsed.name, key);
  }
  for (const [parameter, key] of wrapped) if (!whole.has(parameter)) whole.set(parameter, key);
  const copies = withoutCopies(parts, leftover, config, (name, key) => put(biases, name, key));
  if (leftover.length > 0) throw leftoverError(leftover, refuse);
  const warnings: string[] = [];
  if (copies.length > 0)
    warnings.push(
      `${copies.join(", ")}: copies of the base's own weights, not used. If the vocabulary was resized before ` +
        "training, use the adapter with that resized base",
    );
  if (unlisted.length > 0)
    warnings.push(`${unlisted.join(", ")}: not in modules_to_save, but replaces the base's whole, as in PEFT`);
  return { parts, rows, whole, biases, warnings };
}

/**
 * Embeddings and heads, by the last part of their name, that PEFT saves whole without being asked when the vocabulary
 * was resized (`save_embedding_layers`). The configuration does not list them.
 */
const EMBEDDINGS =
  /(^|\.)(embed_tokens|lm_head|word_embeddings|shared|wte|embed_in|embed_out|tok_embeddings)\.(weight|bias)$/;

/** The place of a tensor; undefined where nothing accounts for it. */
function placeOf(
  { kind, name }: PeftKey,
  { modulesToSave, bias }: PeftConfig,
): "part" | "rows" | "whole" | "wrapped" | "biases" | "unlisted" | "unused" | undefined {
  if (kind === "part" || kind === "rows") return kind;
  if (isSaved(name, modulesToSave)) return kind === "original" ? "unused" : kind === "plain" ? "whole" : "wrapped";
  if (kind !== "plain") return undefined;
  if (bias !== "none" && /(^|\.)bias$/.test(name)) return "biases";
  // Earlier versions of PEFT saved every parameter with "bias" in its name, such as T5's
  // relative_attention_bias.weight.
  if (bias === "all" && name.includes("bias")) return "whole";
  return EMBEDDINGS.test(name) ? "unlisted" : undefined;
}

/**
 * Tells whether PEFT saves a parameter's module whole. PEFT wraps every module whose name ends with an entry, not only
 * at a dot (`_set_trainable`).
 */
function isSaved(parameter: string, modulesToSave: readonly string[]): boolean {
  for (let dot = parameter.indexOf("."); dot >= 0; dot = parameter.indexOf(".", dot + 1)) {
    const module = parameter.slice(0, dot);
    if (modulesToSave.some((name) => module.endsWith(name))) return true;
  }
  return false;
}

/**
 * Checks a name before it is interpreted, which may be slow for long names.
 * @throws AdapterError for one that a pack cannot hold
 */
export function checkName(key: string, refuse: PeftTensors["refuse"]): void {
  if (!/\p{Cc}/u.test(key) && new TextEncoder().encode(key).length <= MAX_NAME_BYTES) return;
  const expected = `expected ${MAX_NAME_BYTES} bytes at most, without control characters; rename it`;
  throw refuse(key.slice(0, 80), `tensor ${show(key)}: ${expected}`);
}

/** Tensors that make a module an adapted one. */
const FACTORS: readonly KeyRole[] = ["A", "B", "embeddingA", "embeddingB"];

/** Removes modules that are not adapted from `parts`. @returns the copies of the base's own weights in the others */
function withoutCopies(
  parts: Map<string, Map<KeyRole, string>>,
  leftover: string[],
  config: PeftConfig,
  putBias: (name: string, key: string) => void,
): string[] {
  const copies: string[] = [];
  for (const [module, keys] of parts) {
    const [weight, bias] = [keys.get("baseWeight"), keys.get("baseBias")];
    const adapted = FACTORS.some((part) => keys.has(part));
    if (weight !== undefined) (adapted ? copies : leftover).push(weight);
    if (bias !== undefined) {
      if (config.bias !== "none") putBias(`${module}.bias`, bias);
      else (adapted && weight !== undefined ? copies : leftover).push(bias);
    }
    if (adapted) continue;
    for (const [part, key] of keys) if (part === "magnitude" || part === "loraBias") leftover.push(key);
    parts.delete(module);
  }
  return copies;
}

/** @throws AdapterError for a tensor of no float */
export function checkFloats(key: string, dtype: string, refuse: PeftTensors["refuse"]): void {
  if (isFloatDtype(dtype)) return;
  throw refuse(key, `tensor ${key} is ${dtype}, expected F32, F16, BF16 or F64; save the adapter in one of these`);
}

/** Makes the error for a tensor that is there under two names: with and without prefix or adapter name. */
export function twice(first: string, second: string, refuse: PeftTensors["refuse"]): AdapterError {
  return refuse(second, `tensors ${first} and ${second} are the same one of two adapters; save one adapter at a time`);
}

function leftoverError(keys: readonly string[], refuse: PeftTensors["refuse"]): AdapterError {
  return refuse(
    keys[0]!,
    `nothing in adapter_config.json accounts for ${listed(keys)}. List the module in modules_to_save if it replaces the ` +
      "base's, set bias if these are trained biases, save it with PEFT's save_pretrained, or remove the tensors",
  );
}

// Interprets the names of the tensors in PEFT's adapter_model.safetensors. Uses names only, neither shapes nor the
// configuration. Accepted: with or without the prefix `base_model.model.`, with or without the adapter's own name after
// `lora_A` and the like (`lora_A.default.weight`).

/** The tensors that one adapted module may have. `baseWeight` and `baseBias` are copies of the base's own. */
export type KeyRole = "A" | "B" | "embeddingA" | "embeddingB" | "loraBias" | "magnitude" | "baseWeight" | "baseBias";

interface PeftKey {
  /**
   * "part" of an adapted module; replaced "rows" of an embedding; a parameter by its "plain" name: saved whole, or a
   * bias; the same "wrapped", under the wrapper's own name, where PEFT prefers the plain one; the base's "original" of
   * it, which PEFT does not use.
   */
  readonly kind: "part" | "rows" | "plain" | "wrapped" | "original";
  /** The base's name of the module, of a part and of rows, or of the parameter. */
  readonly name: string;
  /** Set for a part. */
  readonly part?: KeyRole;
}

const PREFIX = "base_model.model.";

/** Segments that PEFT's wrappers add. If one is left over, the name was not understood. */
const WRAPPER = /(^|\.)(base_layer|lora_[^.]*|token_adapter|modules_to_save|original_module)(\.|$)/;

const PARTS: readonly (readonly [RegExp, KeyRole])[] = [
  [/^(.+)\.lora_A(?:\.[^.]+)?\.weight$/, "A"],
  [/^(.+)\.lora_B(?:\.[^.]+)?\.weight$/, "B"],
  [/^(.+)\.lora_B(?:\.[^.]+)?\.bias$/, "loraBias"],
  [/^(.+)\.lora_embedding_A(?:\.[^.]+)?$/, "embeddingA"],
  [/^(.+)\.lora_embedding_B(?:\.[^.]+)?$/, "embeddingB"],
  [/^(.+)\.lora_magnitude_vector(?:\.[^.]+)?(?:\.weight)?$/, "magnitude"],
  [/^(.+)\.base_layer\.weight$/, "baseWeight"],
  [/^(.+)\.base_layer\.bias$/, "baseBias"],
];

/** Names of the adapters in a file, which may stand in its tensors' names. */
function adapterNames(keys: Iterable<string>): Set<string> {
  return new Set(["default", ...[...keys].flatMap((key) => /\.lora_[AB]\.([^.]+)\.weight$/.exec(key)?.[1] ?? [])]);
}

/** Interprets a tensor's name; undefined where it is unknown. @param adapters names of the adapters in its file */
export function parsePeftKey(key: string, adapters: ReadonlySet<string> = adapterNames([key])): PeftKey | undefined {
  const parsed = parse(key.startsWith(PREFIX) ? key.slice(PREFIX.length) : key, adapters);
  return WRAPPER.test(parsed.name) ? undefined : parsed;
}

function parse(name: string, adapters: ReadonlySet<string>): PeftKey {
  for (const [pattern, part] of PARTS) {
    const module = pattern.exec(name)?.[1];
    if (module !== undefined) return { kind: "part", name: module, part };
  }
  const module = /^(.+)\.token_adapter\.trainable_tokens_delta(?:\.[^.]+)?$/.exec(name)?.[1];
  if (module !== undefined) return { kind: "rows", name: module };
  const [, owner, wrapper, rest] = /^(.+)\.(modules_to_save|original_module)\.(.+)$/.exec(name) ?? [];
  if (owner === undefined || rest === undefined) return { kind: "plain", name };
  if (wrapper === "original_module") return { kind: "original", name: `${owner}.${rest}` };
  // A first segment is the adapter's name only where it is known to be one: a saved module may have children.
  const [first = "", ...others] = rest.split(".");
  return { kind: "wrapped", name: `${owner}.${others.length > 0 && adapters.has(first) ? others.join(".") : rest}` };
}

// Writes a canonical adapter as the two files that PEFT loads, with the same weights. Scales stay in B, so every
// module's alpha equals its rank.

/**
 * Makes the contents of adapter_config.json and of adapter_model.safetensors (f32), for `writeSafetensors` with the
 * metadata `format: "pt"` that PyTorch's tools expect. Holds one adapter in memory.
 * @throws AdapterError when PEFT's format, which has one switch per adapter for DoRA, `lora_bias` and the orientation
 *   of weights, cannot express this adapter; and errors of the adapter's `read`
 */
export async function peftFiles(adapter: Exportable): Promise<{ config: object; tensors: SafetensorsEntry[] }> {
  checkAdapter("peftFiles", adapter);
  refuseBoth({ ...adapter, file: adapter.id });
  const tensors: SafetensorsEntry[] = [];
  const add: Add = (name, shape, values) => void tensors.push(f32Entry(PREFIX + name, shape, values));
  const dora: string[] = [];
  for (const module of adapter.modules.values()) if (await addModule(module, add)) dora.push(module.name);
  const config = configOf(adapter, dora, await addSaved(adapter, add));
  return { config, tensors };
}

function refusal({ id }: Exportable, field: string, message: string): AdapterError {
  return new AdapterError(`${message}; fold it into its base instead`, { file: id, field });
}

/** Modules with more than factors. */
interface SavedModules {
  readonly heads: Set<string>;
  readonly biased: string[];
  readonly deltas: string[];
  readonly rows: [string, readonly number[]][];
}

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
  // The anchor leaves nothing for PEFT's `(.*\.)?` in front: each pattern matches one module.
  const exactly = (name: string): string => `^${name.replaceAll(/[\\^$.*+?()[\]{}|]/g, "\\$&")}`;
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
 * The module that PEFT must save whole to hold a parameter of `owner`: the head around it where the task type has one,
 * since PEFT wraps that head anyway, else `owner` itself.
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
