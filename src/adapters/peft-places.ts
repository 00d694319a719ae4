/**
 * Assigns every tensor of a PEFT file to its module or parameter; a file with a tensor left over is refused. Reads no values.
 */
import type { WeightHost } from "../core/base.ts";
import { AdapterError } from "../errors.ts";
import { isFloatDtype, show, type TensorFile } from "../tensor/tensor-file.ts";
import type { PeftConfig } from "./peft-config.ts";
import { type KeyRole, type PeftKey, parsePeftKeys } from "./peft-keys.ts";

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
export interface Places {
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
export function place({ file, config, refuse }: PeftTensors): Places {
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
