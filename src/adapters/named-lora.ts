/**
 * LoRA files that describe themselves by the names of their tensors, without a configuration: those of diffusers,
 * kohya, llama.cpp, ONNX Runtime and MLX. Every tensor gets its module, or the file is refused. The reader of each
 * format interprets the names.
 */

import { AdapterError, listed } from "../errors.ts";
import { show, type TensorFile } from "../tensor/safetensors.ts";
import {
  type Adapter,
  type AdapterModule,
  compare,
  type Derived,
  openSafetensors,
  readAdapterFile,
  type SavedTensor,
  transposed,
  withDerived,
} from "./adapter.ts";
import {
  checkFloats,
  checkName,
  type KeyRole,
  type PeftFiles,
  type PeftTensors,
  peftTensors,
  readModule,
  refuser,
  twice,
} from "./peft.ts";
import type { PeftConfig } from "./peft-config.ts";

/** Meaning of a tensor's name. */
export interface LoraKey {
  /** The module, with its model in front. */
  readonly module: string;
  readonly part: KeyRole | "alpha";
  /** The model of a pipeline that it belongs to. Default: "", where there is only one. */
  readonly prefix?: string;
  /** The module within its model, as PEFT's patterns mean it. Default: `module`. */
  readonly local?: string;
}

/** The tensors of one module. */
export interface LoraParts {
  readonly prefix: string;
  readonly local: string;
  readonly keys: Map<KeyRole, string>;
  alpha?: string;
}

/**
 * Assigns every tensor to its module, sorted by name.
 * @param parse interprets a name; undefined where it is no name of the format
 * @param expected says what names should be, of those that are none
 * @param foreign finds one of those that is of another format, which the error then names. Default: none is
 * @throws AdapterError for a tensor without a module, and for two that are the same
 */
export function sortTensors(
  file: TensorFile,
  parse: (name: string) => LoraKey | undefined,
  expected: (names: readonly string[]) => string,
  foreign: (names: readonly string[]) => { name: string; message: string } | undefined = () => undefined,
): Map<string, LoraParts> {
  const refuse = refuser(file);
  for (const key of file.tensors.keys()) checkName(key, refuse);
  const parts = new Map<string, LoraParts>();
  const others: string[] = [];
  for (const [key, { dtype }] of file.tensors) {
    const parsed = parse(key);
    if (parsed === undefined) {
      others.push(key);
      continue;
    }
    checkFloats(key, dtype, refuse);
    const { module, part, prefix = "", local = module } = parsed;
    checkName(module, refuse);
    const found: LoraParts = parts.get(module) ?? { prefix, local, keys: new Map() };
    parts.set(module, found);
    const other = part === "alpha" ? found.alpha : found.keys.get(part);
    if (other !== undefined) throw twice(other, key, refuse);
    if (part === "alpha") found.alpha = key;
    else found.keys.set(part, key);
  }
  const known = foreign(others);
  if (known) throw refuse(known.name, `tensor ${known.name} ${known.message}`);
  if (others.length > 0) throw refuse(others[0]!, `${listed(others)}: ${expected(others)}`);
  if (parts.size === 0) throw new AdapterError("holds no tensors; save the adapter again", { file: file.name });
  return new Map([...parts].sort(([a], [b]) => compare(a, b)));
}

/**
 * Scales of modules: alpha ÷ rank, 1 without an alpha.
 * @throws AdapterError for one that is no number, or belongs to no module
 */
export async function scalesOf(
  file: TensorFile,
  parts: ReadonlyMap<string, LoraParts>,
): Promise<(module: string, rank: number) => number> {
  const refuse = refuser(file);
  const alphas = new Map<string, number>();
  for (const [module, { alpha: key, keys }] of parts) {
    if (key === undefined) continue;
    if (keys.size === 0) throw refuse(key, `${key} is the alpha of ${module}, which has no factors; remove it`);
    const { shape } = file.tensors.get(key)!;
    if (shape.some((size) => size !== 1)) throw refuse(key, `${key} is [${shape.join(", ")}], expected one number`);
    const [value] = await file.readF32(key);
    if (!Number.isFinite(value))
      throw refuse(key, `${key} is ${value}, expected a number; take another copy of the file`);
    alphas.set(module, value!);
  }
  return (module, rank) => (alphas.get(module) ?? rank) / rank;
}

/**
 * Makes modules of a file.
 * @param scaleOf the scale of a module by its rank, where it has no configuration
 * @param configOf the configuration of a module. Default: no module has one
 */
export function assembleLora(
  file: TensorFile,
  parts: ReadonlyMap<string, LoraParts>,
  scaleOf: (name: string, rank: number) => number,
  configOf: (parts: LoraParts) => PeftConfig | undefined = () => undefined,
): { modules: Map<string, AdapterModule>; saved: SavedTensor[] } {
  const modules = new Map<string, AdapterModule>();
  const saved: SavedTensor[] = [];
  for (const [name, found] of parts) {
    const { local, keys } = found;
    const config = configOf(found) ?? shownBy(file, keys, (rank) => scaleOf(name, rank));
    const { scale } = config.forModule(local);
    const tensors = peftTensors(file, { ...config, forModule: () => config.forModule(local) });
    const module = readModule(name, keys, tensors);
    modules.set(name, module);
    const bias = keys.get("loraBias");
    if (bias === undefined) continue;
    const read = (): Promise<Float32Array> => tensors.read(bias, scale);
    saved.push({ name: `${name}.bias`, role: "bias-delta", shape: [module.out], read });
  }
  return { modules, saved };
}

/** Configuration that follows from a module's tensors alone. */
function shownBy(
  file: TensorFile,
  keys: ReadonlyMap<KeyRole, string>,
  scaleOf: (rank: number) => number,
): PeftTensors["config"] {
  const factor = keys.get("A") ?? keys.get("embeddingA");
  const rank = (factor && file.tensors.get(factor)!.shape[0]) || 1;
  return {
    fanInFanOut: false,
    loraBias: keys.has("loraBias"),
    dora: keys.has("magnitude"),
    start: undefined,
    forModule: () => ({ rank, scale: scaleOf(rank) }),
  };
}

/** Transposes the matrices with these names: [in, r] and [r, out] become [r, in] and [out, r]. */
export function transposeMatrices<F extends TensorFile>(file: F, names: RegExp): F {
  const matrices = [...file.tensors].filter(([name, { shape }]) => names.test(name) && shape.length === 2);
  return withDerived(file, new Map(matrices.map(([name]): [string, Derived] => [name, transposed(file, name)])));
}

// MLX LM saves `adapter_config.json` and `adapters.safetensors`. Factors in the file are [in, r] and [r, out]; the
// configuration holds the scale itself.

/**
 * Opens an adapter: checks its configuration and the names, shapes and dtypes of all tensors. Values are read, and
 * checked, when a module's `read` is called.
 * @throws AdapterError naming the field or tensor that cannot be represented, and what to do
 * @throws FormatError when the tensor file breaks the safetensors format; SourceError when it cannot be read
 */
export async function readMlx({ config, ...files }: Omit<PeftFiles, "base">): Promise<Adapter> {
  const { scale, baseModel, warnings } = readConfig(config, `${files.file}/adapter_config.json`);
  return readAdapterFile(files, openSafetensors, (found) => {
    const tensors = transposeMatrices(found, /\.lora_[ab]$/);
    const expected = "expected lora_a, lora_b and m of each module, as MLX LM saves them; save the adapter again";
    const parts = sortTensors(tensors, parseKey, () => expected);
    return { ...assembleLora(tensors, parts, () => scale), baseModel, warnings };
  });
}

interface MlxConfig extends Pick<Adapter, "baseModel" | "warnings"> {
  readonly scale: number;
}

function readConfig(config: unknown, file: string): MlxConfig {
  const refuse = refuser({ name: file });
  const { fine_tune_type: type = "lora", lora_parameters, model } = (config ?? {}) as Record<string, unknown>;
  if (type !== "lora" && type !== "dora") {
    throw refuse(
      "fine_tune_type",
      `fine_tune_type is ${show(type)}, expected "lora" or "dora": whole weights do not fit into a pack`,
    );
  }
  const { scale, alpha, rank } = (lora_parameters ?? {}) as Record<string, unknown>;
  if (typeof scale !== "number" || !Number.isFinite(scale)) {
    throw refuse("lora_parameters", `lora_parameters.scale is ${show(scale)}, expected a number, as MLX LM writes it`);
  }
  const warnings: string[] = [];
  if (typeof alpha === "number" && typeof rank === "number" && alpha !== rank) {
    const scaled = Number(((scale * alpha) / rank).toPrecision(6));
    warnings.push(
      `lora_parameters.alpha is ${alpha}, which MLX LM no longer reads: the scale is ${scale}. If an older version trained it, set scale to ${scaled} and remove alpha`,
    );
  }
  return { scale, baseModel: typeof model === "string" && model !== "" ? model : undefined, warnings };
}

/** Modules whose rows are tokens. */
const EMBEDDING = /(^|\.)(embed_tokens|word_embeddings|wte|tok_embeddings|embed_in)$/;

function parseKey(name: string): LoraKey | undefined {
  const [, module, what] = /^(.+)\.(lora_a|lora_b|m)$/.exec(name) ?? [];
  if (module === undefined) return undefined;
  const embedding = EMBEDDING.test(module);
  const part =
    what === "m" ? "magnitude" : what === "lora_a" ? (embedding ? "embeddingA" : "A") : embedding ? "embeddingB" : "B";
  return { module, part };
}
