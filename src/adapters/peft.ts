/**
 * Reads an adapter as PEFT saves it, `adapter_config.json` and `adapter_model.safetensors`, into the canonical form. Rank and scale of a
 * module come from the same fields and patterns as in PEFT. A file that PEFT would not load, or would load in part only, is refused.
 * Portable: folders are read in folder.ts.
 */
import { checkOptions } from "../arguments.ts";
import type { BaseInput, WeightHost } from "../core/base.ts";
import { openHost } from "../core/open-base.ts";
import { AdapterError } from "../errors.ts";
import { type Layout, misfitLabels, type TaskMetadata } from "../format/format.ts";
import type { SourceInput } from "../source.ts";
import { isFloatDtype, show, type TensorFile, transpose } from "../tensor/tensor-file.ts";
import type { Term } from "../tensor/term.ts";
import { type Adapter, type AdapterModule, compare, readAdapterFile, type SavedTensor } from "./adapter.ts";
import { NamePatterns } from "./name-pattern.ts";
import { openSafetensors } from "./safetensors.ts";
import type { BaseStart } from "./start.ts";

/** The files of one PEFT adapter. */
export interface PeftFiles {
  /** Task id. */
  readonly id: string;
  /** The adapter's folder or address, for messages. */
  readonly file: string;
  /** Parsed adapter_config.json. */
  readonly config: unknown;
  /** adapter_model.safetensors: path, URL, Blob, bytes or ByteSource. Closed by the adapter's `close`. */
  readonly tensors: SourceInput;
  /** Parsed task.json, where there is one. */
  readonly task?: unknown;
  /**
   * Weights of the base model, for an adapter that began as PiSSA or OLoRA: ΔW then is relative to these. A host is the caller's to
   * close, after the adapter. Default: none; such an adapter is refused.
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
      const { modules, saved, warnings } = assemble(peftTensors(tensors, config, base));
      const misfit = misfitLabels(metadata.labels, saved);
      if (misfit !== undefined) {
        const advice = "list one name for each row, in their order";
        throw new AdapterError(`${misfit}; ${advice}`, { file: `${files.file}/task.json`, field: "labels" });
      }
      return {
        modules,
        saved,
        baseModel: config.baseModel,
        metadata: withIdentity(metadata, config),
        warnings: [
          ...[...config.warnings, ...warnings, ...labelWarnings(metadata.labels, saved)],
          ...tieWarnings([...modules.keys()], saved),
        ],
      };
    });
    return base === undefined ? adapter : { ...adapter, close: () => adapter.close().then(close) };
  } catch (error) {
    await close();
    throw error;
  }
}

/** Warns where labels may not fit: an unknown layer need not be the head that they belong to. */
function labelWarnings(labels: readonly string[] | undefined, saved: readonly SavedTensor[]): string[] {
  const layers = saved.filter(({ role, shape }) => role === "saved" && shape.length === 2);
  if (!labels || layers.length === 0 || layers.some(({ shape }) => shape[0] === labels.length)) return [];
  return [`task.json has ${labels.length} labels, but no saved layer has as many rows: check that they are the base's`];
}

/** Embeddings that heads are tied to in many language models, and the heads, by the last part of their name. */
const TIED = /(^|\.)(embed_tokens|wte|shared|embed_in)$/;
const HEADS = /(^|\.)(lm_head|embed_out)$/;

/** Warns of an embedding that changes without its head. PEFT leaves a tied head as it was then, which one weight for both cannot do. */
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

/** Makes modules and saved tensors of a file. */
function assemble(tensors: PeftTensors): {
  modules: Map<string, AdapterModule>;
  saved: SavedTensor[];
  warnings: string[];
} {
  const { refuse, shape, read, file } = tensors;
  const places = place(tensors);
  const modules = new Map<string, AdapterModule>();
  for (const [name, keys] of [...places.parts].sort(([a], [b]) => compare(a, b))) {
    const whole = places.whole.get(`${name}.weight`) ?? places.rows.get(name);
    if (whole !== undefined) {
      throw refuse(whole, `${whole} replaces weights of ${name}, which is also adapted; save the adapter again`);
    }
    modules.set(name, readModule(name, keys, tensors));
  }
  if (modules.size === 0)
    throw new AdapterError("holds no lora_A and lora_B; expected what PEFT's save_pretrained writes", {
      file: file.name,
    });
  const saved = [...savedBiases(places, modules, tensors), ...savedRows(places, tensors)];
  for (const [name, key] of places.whole) {
    saved.push({ name, role: "saved", shape: shape(key), read: () => read(key) });
  }
  for (const tensor of saved) checkShape(tensor, refuse);
  saved.sort((a, b) => compare(a.name, b.name));
  return { modules, saved, warnings: places.warnings };
}

/** @throws AdapterError for a shape that a pack cannot hold (SPEC.md, section 6.2) */
function checkShape({ name, role, shape }: SavedTensor, refuse: PeftTensors["refuse"]): void {
  const [most, expected] = role === "bias" ? [1, "one dimension"] : [8, "1 to 8 dimensions"];
  if (shape.length > 0 && shape.length <= most && !shape.includes(0)) return;
  throw refuse(name, `${name} is [${shape.join(", ")}], expected ${expected} of at least 1; save the adapter again`);
}

/** Replaced biases, and those that `lora_bias` adds. A bias that is both is read as their sum. */
function savedBiases(
  { parts, biases }: Places,
  modules: ReadonlyMap<string, AdapterModule>,
  { config, shape, describe, refuse, read }: PeftTensors,
): SavedTensor[] {
  const saved: SavedTensor[] = [];
  for (const [module, { out }] of modules) {
    const name = `${module}.bias`;
    const whole = biases.get(name);
    if (whole !== undefined && shape(whole).join() !== String(out)) {
      throw refuse(whole, `${describe(whole)}, expected [${out}]; save the adapter again`);
    }
    const delta = parts.get(module)!.get("loraBias");
    if (delta === undefined) continue;
    const { scale } = config.forModule(module);
    const readDelta = (): Promise<Float32Array> => read(delta, scale);
    const readSum = async (): Promise<Float32Array> => {
      const bias = await read(whole!);
      const added = await readDelta();
      return bias.map((value, i) => value + added[i]!);
    };
    if (whole === undefined) saved.push({ name, role: "bias-delta", shape: [out], read: readDelta });
    else saved.push({ name, role: "bias", shape: [out], read: readSum });
  }
  const summed = new Set(saved.map(({ name }) => name));
  for (const [name, key] of biases) {
    if (summed.has(name)) continue;
    saved.push({ name, role: "bias", shape: shape(key), read: () => read(key) });
  }
  return saved;
}

/**
 * Rows of embeddings. Despite its name, `trainable_tokens_delta` holds the new rows themselves (peft's
 * tuners/trainable_tokens/layer.py copies them in).
 */
function savedRows({ rows }: Places, { config, shape, describe, refuse, read }: PeftTensors): SavedTensor[] {
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
    in: kernel.reduce((a, b) => a * b, inputs),
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
    const advice = `Give the base's weights, as \`base\` (--base). Or: ${CONVERT}`;
    throw refuse("init_lora_weights", `${withoutBase(start)}. ${advice}`);
  }
  const rank = module.rank + Math.min(module.rank, module.in, module.out);
  const read = async (): Promise<Term> =>
    (await import("./start.ts")).fromBase(start, module, await module.read(), scale, base, file.name);
  return { ...module, rank, read };
}

/** Largest rank and kernel that a pack holds. */
const MAX_SIZE = 65_535;

/** The tensors of both factors. */
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

/** Checks a vector [out] that a module has if a field of the configuration is set; magnitudes of convolutions are [1, out, 1…]. */
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
  if (found[at] === out && found.reduce((a, b) => a * b, 1) === out && (at > 0 || found.length === 1)) return;
  throw refuse(key, `${describe(key)}, expected [${out}]; save the adapter again`);
}

// Assigns every tensor of a PEFT file to its module or parameter; a file with a tensor left over is refused. Reads no values.

/** A tensor file, its configuration, and what every check of them needs. */
export interface PeftTensors {
  readonly file: TensorFile;
  readonly config: PeftConfig;
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

export function peftTensors(file: TensorFile, config: PeftConfig, base?: WeightHost): PeftTensors {
  const shape = (key: string): readonly number[] => file.tensors.get(key)!.shape;
  const refuse = (field: string, message: string): AdapterError =>
    new AdapterError(message, { file: file.name, field });
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

/** Multiplies values in place until one is not finite. Returns how many are. Loops of an async function are compiled late. */
function multiplied(values: Float32Array, scale: number): number {
  let i = 0;
  for (; i < values.length; i++) {
    values[i] = values[i]! * scale;
    if (!Number.isFinite(values[i])) break;
  }
  return i;
}

/** Assignment of a file's tensors: keys by the name of the module or parameter. */
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
function place({ file, config, refuse }: PeftTensors): Places {
  const [parts, rows] = [new Map<string, Map<KeyRole, string>>(), new Map<string, string>()];
  const named = {
    whole: new Map<string, string>(),
    wrapped: new Map<string, string>(),
    biases: new Map<string, string>(),
  };
  const [leftover, unlisted]: string[][] = [[], []];

  /** Adds a key. Two spellings of one tensor, with and without prefix or adapter name, mean two adapters in one file. */
  const put = <K extends string>(map: Map<K, string>, name: K, key: string): void => {
    const other = map.get(name);
    if (other !== undefined) {
      throw refuse(key, `tensors ${other} and ${key} are the same one of two adapters; save one adapter at a time`);
    }
    map.set(name, key);
  };

  for (const key of file.tensors.keys()) checkName(key, refuse);
  for (const [key, parsed] of parsePeftKeys(file.tensors.keys())) {
    const { dtype } = file.tensors.get(key)!;
    if (!isFloatDtype(dtype)) {
      throw refuse(key, `tensor ${key} is ${dtype}, expected F32, F16, BF16 or F64; save the adapter in one of these`);
    }
    if (parsed.kind === "part") {
      const { module, part } = parsed;
      if (!parts.has(module)) parts.set(module, new Map());
      put(parts.get(module)!, part, key);
    } else if (parsed.kind === "rows") put(rows, parsed.module, key);
    else if (parsed.kind === "unknown") leftover!.push(key);
    else {
      const where = placeOf(parsed, config);
      if (where === undefined) leftover!.push(key);
      else if (where !== "unused") put(named[where === "unlisted" ? "whole" : where], parsed.parameter, key);
      if (where === "unlisted") unlisted!.push(key);
    }
  }
  const { whole, wrapped, biases } = named;
  for (const [parameter, key] of wrapped) if (!whole.has(parameter)) whole.set(parameter, key);
  const copies = withoutCopies(parts, leftover!, config, (name, key) => put(biases, name, key));
  if (leftover!.length > 0) throw leftoverError(leftover!, refuse);
  return { parts, rows, whole, biases, warnings: warningsOf(copies, unlisted!) };
}

/**
 * Embeddings and heads, by the last part of their name, that PEFT saves whole without being asked when the vocabulary was resized
 * (`save_embedding_layers`). The configuration does not list them.
 */
const EMBEDDINGS =
  /(^|\.)(embed_tokens|lm_head|word_embeddings|shared|wte|embed_in|embed_out|tok_embeddings)\.(weight|bias)$/;

/** Role of a parameter outside adapted modules; undefined where nothing accounts for it. */
function placeOf(
  { kind, parameter }: Extract<PeftKey, { parameter: string }>,
  { modulesToSave, bias }: PeftConfig,
): "whole" | "wrapped" | "biases" | "unlisted" | "unused" | undefined {
  if (isSaved(parameter, modulesToSave)) return kind === "original" ? "unused" : kind === "plain" ? "whole" : "wrapped";
  if (kind !== "plain") return undefined;
  if (bias !== "none" && /(^|\.)bias$/.test(parameter)) return "biases";
  // Earlier versions of PEFT saved every parameter with "bias" in its name, such as T5's relative_attention_bias.weight.
  if (bias === "all" && parameter.includes("bias")) return "whole";
  return EMBEDDINGS.test(parameter) ? "unlisted" : undefined;
}

/**
 * Whether PEFT saves a parameter's module whole. PEFT wraps every module whose name ends with an entry, not only at a dot
 * (`_set_trainable`).
 */
function isSaved(parameter: string, modulesToSave: readonly string[]): boolean {
  for (let dot = parameter.indexOf("."); dot >= 0; dot = parameter.indexOf(".", dot + 1)) {
    const module = parameter.slice(0, dot);
    if (modulesToSave.some((name) => module.endsWith(name))) return true;
  }
  return false;
}

/** Checks a name before it is interpreted, which may be slow for long names. @throws AdapterError for one that a pack cannot hold */
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

function warningsOf(copies: readonly string[], unlisted: readonly string[]): string[] {
  return [
    ...(copies.length > 0
      ? [
          `${copies.join(", ")}: copies of the base's own weights, not used. If the vocabulary was resized before ` +
            "training, use the adapter with that resized base",
        ]
      : []),
    ...(unlisted.length > 0
      ? [`${unlisted.join(", ")}: not in modules_to_save, but replaces the base's whole, as in PEFT`]
      : []),
  ];
}

function leftoverError(keys: readonly string[], refuse: PeftTensors["refuse"]): AdapterError {
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

// Interprets the names of the tensors in PEFT's adapter_model.safetensors. Uses names only, neither shapes nor the configuration.
// Accepted: with or without the prefix `base_model.model.`, with or without the adapter's own name after `lora_A`,
// `modules_to_save` and the like (`lora_A.default.weight`).

/** The tensors that one adapted module may have. `baseWeight` and `baseBias` are copies of the base's own. */
export type KeyRole = "A" | "B" | "embeddingA" | "embeddingB" | "loraBias" | "magnitude" | "baseWeight" | "baseBias";

/** Meaning of a tensor's name. Names of modules and parameters are those of the base model. */
type PeftKey =
  | { kind: "part"; module: string; part: KeyRole }
  /** Replaced rows of an embedding. */
  | { kind: "rows"; module: string }
  /** A parameter by its plain name: saved whole, or a bias. */
  | { kind: "plain"; parameter: string }
  /** The same parameter under the wrapper's own name; PEFT prefers the plain one. */
  | { kind: "wrapped"; parameter: string }
  /** The base's own copy of a saved module's parameter, which PEFT does not use. */
  | { kind: "original"; parameter: string }
  | { kind: "unknown" };

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

/** Sorts the names of a file's tensors. */
export function parsePeftKeys(keys: Iterable<string>): Map<string, PeftKey> {
  const names = [...keys];
  const adapters = new Set(["default"]);
  for (const name of names) {
    const adapter = /\.lora_[AB]\.([^.]+)\.weight$/.exec(name)?.[1];
    if (adapter !== undefined) adapters.add(adapter);
  }
  return new Map(names.map((name) => [name, parse(name, adapters)]));
}

function parse(key: string, adapters: ReadonlySet<string>): PeftKey {
  const name = key.startsWith(PREFIX) ? key.slice(PREFIX.length) : key;
  const known = (base: string, result: PeftKey): PeftKey => (WRAPPER.test(base) ? { kind: "unknown" } : result);

  for (const [pattern, part] of PARTS) {
    const module = pattern.exec(name)?.[1];
    if (module !== undefined) return known(module, { kind: "part", module, part });
  }
  const module = /^(.+)\.token_adapter\.trainable_tokens_delta(?:\.[^.]+)?$/.exec(name)?.[1];
  if (module !== undefined) return known(module, { kind: "rows", module });

  const [, owner, wrapper, rest] = /^(.+)\.(modules_to_save|original_module)\.(.+)$/.exec(name) ?? [];
  if (owner === undefined || rest === undefined) return known(name, { kind: "plain", parameter: name });
  if (wrapper === "original_module") {
    const parameter = `${owner}.${rest}`;
    return known(parameter, { kind: "original", parameter });
  }
  // A first segment is the adapter's name only where it is known to be one: a saved module may have children.
  const [first = "", ...others] = rest.split(".");
  const parameter = others.length > 0 && adapters.has(first) ? `${owner}.${others.join(".")}` : `${owner}.${rest}`;
  return known(parameter, { kind: "wrapped", parameter });
}

// Reads PEFT's `adapter_config.json`: every field is honoured, known to be harmless, or refused by name. Reads no tensors. Field meanings
// follow peft/tuners/lora/config.py and layer.py of PEFT 0.21; absent fields have PEFT's defaults, since older versions did not write
// them.

/** Facts that a configuration gives about the tensors beside it. */
export interface PeftConfig {
  readonly baseModel: string | undefined;
  readonly revision: string | undefined;
  readonly taskType: string | undefined;
  /** Whether base weights are [in, out] (Conv1D of GPT-2). */
  readonly fanInFanOut: boolean;
  /** Which base biases belong to the adapter. */
  readonly bias: "none" | "all" | "lora_only";
  readonly loraBias: boolean;
  readonly dora: boolean;
  /** Set where PEFT changes the weights of linear layers before it loads the factors (start.ts). */
  readonly start: BaseStart | undefined;
  /** A module is saved when its name ends in one of these. Includes the heads that PEFT saves for the task type. */
  readonly modulesToSave: readonly string[];
  /** Rows replaced by trainable_token_indices: [ending of the embedding's name, indices]; "" matches any. */
  readonly tokenRows: readonly (readonly [ending: string, indices: readonly number[]])[];
  /** Rank and scale that PEFT gives the module of this name. */
  forModule(name: string): { rank: number; scale: number };
  readonly warnings: readonly string[];
}

/** Most characters of a text: a pack holds 4096 bytes (SPEC.md, section 4.2), and a character takes at most three. */
const MAX_TEXT = 1365;

/** PEFT's own way to an adapter of the original base. */
export const CONVERT: string =
  "Convert it in PEFT, where it was trained: save_pretrained(path, path_initial_model_for_weight_conversion=initial_adapter)";

/** Says why an adapter with a start is refused without its base. */
export function withoutBase(start: BaseStart): string {
  return `init_lora_weights is "${start}": PEFT takes the start out of the base when it loads the adapter`;
}

const PLAIN = "Train a plain LoRA, or merge it with PEFT and use the merged model";

/** Fields that give tensors a meaning that low-rank terms cannot express, with the reason. */
const REFUSED: ReadonlyMap<string, string> = new Map([
  ["target_parameters", `puts LoRA on bare parameters (mixture of experts), which are not modules. ${PLAIN}`],
  ["layer_replication", `makes several layers from one base layer, so a module has no weight of its own. ${PLAIN}`],
  ["alora_invocation_tokens", "applies the update after some tokens only (aLoRA): no weight can. Train a plain LoRA"],
  ["use_qalora", `pools the input before lora_A (QALoRA), so lora_A does not fit the base weight. ${PLAIN}`],
  ["use_bdlora", `splits the factors into blocks (BD-LoRA). ${PLAIN}`],
  ["arrow_config", "routes each token to other adapters (Arrow). Pack the adapters it routes to, each as a task"],
  ["kasa_config", `truncates the base weight and adds a diagonal between the factors (KaSA). ${PLAIN}`],
  ["velora_config", "projects lora_A's input while training (VeLoRA). Train a plain LoRA"],
  ["monteclora_config", "samples the factors at random (MonteCLoRA). Train a plain LoRA"],
]);

/** Fields about the adapter's training or origin, or that repeat what the tensors' names tell. */
const HARMLESS: ReadonlySet<string> = new Set([
  "auto_mapping",
  "corda_config",
  "eva_config",
  "exclude_modules",
  "inference_mode",
  "layers_pattern",
  "layers_to_transform",
  "loftq_config",
  "lora_dropout",
  "lora_ga_config",
  "megatron_config",
  "megatron_core",
  "peft_version",
  "qalora_group_size",
  "runtime_config",
  "target_modules",
]);

const HONOURED: ReadonlySet<string> = new Set([
  "alpha_pattern",
  "base_model_name_or_path",
  "bias",
  "ensure_weight_tying",
  "fan_in_fan_out",
  "init_lora_weights",
  "lora_alpha",
  "lora_bias",
  "modules_to_save",
  "peft_type",
  "r",
  "rank_pattern",
  "revision",
  "task_type",
  "trainable_token_indices",
  "use_dora",
  "use_rslora",
]);

/** Heads that PEFT saves without being asked (peft_model.py); its early versions did not list them in the file. */
const EMBEDDED_HEADS: ReadonlyMap<string, readonly string[]> = new Map([
  ["SEQ_CLS", ["classifier", "score"]],
  ["TOKEN_CLS", ["classifier", "score"]],
  ["QUESTION_ANS", ["qa_outputs"]],
]);

/** The modules that PEFT saves by itself for a task type. */
export function headsOf(taskType: string | undefined): readonly string[] {
  return EMBEDDED_HEADS.get(taskType ?? "") ?? [];
}

/** Initialisations that change the base by more than its weights tell: by data, gradients, or numbers drawn at random. */
const MUTATING = /^(pissa|corda|lora_ga$)/;
const UNTOUCHED: ReadonlySet<unknown> = new Set([
  undefined,
  null,
  true,
  false,
  "gaussian",
  "eva",
  "orthogonal",
  "mica",
]);

/**
 * Checks a parsed adapter_config.json.
 * @param file its path, for messages
 * @throws AdapterError naming the field that is refused or invalid
 */
export function readPeftConfig(config: unknown, file: string): PeftConfig {
  if (!isObject(config)) throw new AdapterError("is not a JSON object; expected PEFT's adapter_config.json", { file });
  const { refuse, wrong, field, numbers } = fieldsOf(config, file);
  if (config.peft_type !== "LORA") throw wrong("peft_type", `"LORA"`, "convert the adapter to LoRA, or train one");
  const warnings = unknownFields(config, refuse);

  const r = field("r", 8, isRank, "a positive integer");
  const alpha = field("lora_alpha", 8, isFiniteNumber, "a number");
  const rankPattern = numbers("rank_pattern", isRank, "positive integer");
  const alphaPattern = numbers("alpha_pattern", isFiniteNumber, "number");
  const flag = (name: string): boolean => field(name, false, isBoolean, "true or false");
  const text = (name: string): string | undefined =>
    field(name, undefined, isText, `a string of ${MAX_TEXT} characters at most, or null`) || undefined;
  const rslora = flag("use_rslora");
  const bias = field("bias", "none", isBias, `"none", "all" or "lora_only"`);
  const modulesToSave = field("modules_to_save", [], isNames, "an array of module names");
  const taskType = text("task_type");

  const { start, warnings: unsure } = startOf(config.init_lora_weights, refuse);
  warnings.push(...unsure);
  // The file holds what it ties, but for rows of tokens, which reach tied layers with it and without.
  flag("ensure_weight_tying");
  return {
    baseModel: text("base_model_name_or_path"),
    revision: text("revision"),
    taskType,
    fanInFanOut: flag("fan_in_fan_out"),
    bias,
    loraBias: flag("lora_bias"),
    dora: flag("use_dora"),
    start,
    modulesToSave: [...new Set([...modulesToSave, ...headsOf(taskType)])],
    tokenRows: tokenRows(config.trainable_token_indices, (message) => refuse("trainable_token_indices", message)),
    forModule(name) {
      const rank = rankPattern.find(name) ?? r;
      const numerator = alphaPattern.find(name) ?? alpha;
      return { rank, scale: numerator / (rslora ? Math.sqrt(rank) : rank) };
    },
    warnings,
  };
}

type Refuse = (field: string, message: string) => AdapterError;

/** Readers of fields, which refuse unexpected values. */
function fieldsOf(config: Record<string, unknown>, file: string) {
  const refuse: Refuse = (name, message) => new AdapterError(`${name} ${message}`, { file, field: name });
  const wrong = (name: string, expected: string, advice = "correct it in the file"): AdapterError =>
    refuse(name, `is ${show(config[name])}, expected ${expected}; ${advice}`);
  return {
    refuse,
    wrong,
    /** A field's value, or PEFT's default where it is absent or null. */
    field<T>(name: string, absent: T, isValid: (value: unknown) => value is T, expected: string): T {
      const value = config[name] ?? absent;
      if (!isValid(value)) throw wrong(name, expected);
      return value;
    },
    /** Numbers by the expressions that PEFT matches names with. */
    numbers(name: string, isValid: (value: unknown) => value is number, what: string): NamePatterns<number> {
      const value = config[name] ?? {};
      if (!isObject(value)) throw wrong(name, `an object of ${what}s by pattern`);
      const numbers = Object.entries(value).map(([pattern, number]): [string, number] => {
        if (!isValid(number)) throw refuse(name, `gives ${show(number)} for ${show(pattern)}, expected a ${what}`);
        return [pattern, number];
      });
      return new NamePatterns(numbers, (pattern, why) => refuse(name, `${show(pattern)} ${why}`));
    },
  };
}

/** Warnings about unknown fields. @throws AdapterError for a field that is set and refused */
function unknownFields(config: Record<string, unknown>, refuse: Refuse): string[] {
  const warnings: string[] = [];
  for (const [field, value] of Object.entries(config)) {
    if (HONOURED.has(field) || HARMLESS.has(field) || isOff(value)) continue;
    const reason = REFUSED.get(field);
    if (reason !== undefined) throw refuse(field, `is set: it ${reason}`);
    warnings.push(`${field} is ${show(value)}: an unknown field, ignored; check that it does not change the maths`);
  }
  return warnings;
}

const isBoolean = (value: unknown): value is boolean => typeof value === "boolean";

const isText = (value: unknown): value is string | undefined =>
  value === undefined || (typeof value === "string" && value.length <= MAX_TEXT);

const isBias = (value: unknown): value is PeftConfig["bias"] => ["none", "all", "lora_only"].includes(value as string);

const isNames = (value: unknown): value is string[] =>
  Array.isArray(value) && value.every((name) => typeof name === "string" && name !== "");

function isObject(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

const isFiniteNumber = (value: unknown): value is number => Number.isFinite(value);

const isRank = (value: unknown): value is number => Number.isSafeInteger(value) && (value as number) > 0;

/** Whether Python takes a value as false. An empty object counts as set: PEFT turns it into a configuration of defaults. */
function isOff(value: unknown): boolean {
  return !value || (Array.isArray(value) && value.length === 0);
}

/** @throws AdapterError for a start that changes the base in a way that cannot be computed again */
function startOf(init: unknown, refuse: Refuse): Pick<PeftConfig, "start" | "warnings"> {
  if (UNTOUCHED.has(init)) return { start: undefined, warnings: [] };
  const name = typeof init === "string" ? init.toLowerCase() : "";
  if (name === "pissa" || name === "olora") return { start: name, warnings: [] };
  if (MUTATING.test(name)) {
    throw refuse(
      "init_lora_weights",
      `is ${show(init)}: the adapter was trained against a changed base, which the original does not determine. ${CONVERT}`,
    );
  }
  if (name === "loftq") {
    throw refuse(
      "init_lora_weights",
      'is "loftq": the adapter was trained against the quantised base that LoftQ made. Save that base ' +
        "(model.get_base_model().save_pretrained), use it, and set init_lora_weights to true in the file",
    );
  }
  const unknown = `init_lora_weights is ${show(init)}, which PEFT 0.21 does not know: check that it leaves the base as it was`;
  return { start: undefined, warnings: [unknown] };
}

function tokenRows(value: unknown, refuse: (message: string) => AdapterError): [string, number[]][] {
  if (value === undefined || value === null) return [];
  if (!Array.isArray(value) && !isObject(value)) {
    throw refuse(`is ${show(value)}, expected an array of row numbers, or an object of such by embedding name`);
  }
  const entries = Array.isArray(value) ? ([["", value]] as const) : Object.entries(value);
  return entries.map(([ending, rows]) => {
    if (!Array.isArray(rows) || !rows.every((row) => Number.isSafeInteger(row) && row >= 0)) {
      throw refuse(`has ${show(rows)}${ending && ` for ${show(ending)}`}, expected an array of row numbers ≥ 0`);
    }
    if (new Set(rows).size !== rows.length) throw refuse("names a row twice, which has no defined result; train again");
    return [ending, rows as number[]];
  });
}
