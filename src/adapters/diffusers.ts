/**
 * Reads a LoRA as diffusers saves it, one safetensors file for all models of a pipeline, into the canonical form. Modules are
 * named from the pipeline down: "unet.down_blocks.0.….attn1.to_q", whichever of diffusers' generations wrote the file. Where the
 * header has no `lora_adapter_metadata`, rank and DoRA are what the tensors show, and a module without alpha has alpha = rank, as
 * in diffusers. Portable: folders are read in folder.ts.
 */
import { AdapterError } from "../errors.ts";
import type { TaskMetadata } from "../format/format.ts";
import type { SourceInput } from "../source.ts";
import { parseJson } from "../tensor/json.ts";
import { isFloatDtype, type SafetensorsFile } from "../tensor/safetensors.ts";
import type { Adapter, AdapterModule, SavedTensor } from "./adapter.ts";
import { bareModel, foreignName, MODELS, parseDiffusersKey, prefixOf } from "./diffusers-keys.ts";
import { readTaskMetadata } from "./metadata.ts";
import { compare } from "./modules.ts";
import { type PeftConfig, readPeftConfig } from "./peft-config.ts";
import type { KeyRole } from "./peft-keys.ts";
import { readModule } from "./peft-module.ts";
import { checkName, type PeftTensors, peftTensors } from "./peft-places.ts";
import { openSafetensors } from "./safetensors.ts";

/** The file of one LoRA of diffusers. */
export interface DiffusersFiles {
  /** Task id. */
  readonly id: string;
  /** The adapter's folder, file or address, for messages. */
  readonly file: string;
  /** pytorch_lora_weights.safetensors: path, URL, Blob, bytes or ByteSource. Closed by the adapter's `close`. */
  readonly tensors: SourceInput;
  /** Parsed task.json, where there is one. */
  readonly task?: unknown;
}

/** Fields of the header. The second is an argument of diffusers' functions, whose place is in tensors named "….alpha". */
const [METADATA, ALPHAS] = ["lora_adapter_metadata", "network_alphas"];

/**
 * Opens an adapter: checks its header and the names, shapes and dtypes of all tensors, and reads the alphas. Other values are read,
 * and checked, when a module's `read` is called.
 * @throws AdapterError naming the field or tensor that cannot be represented, and what to do
 * @throws FormatError when the file breaks the safetensors format; SourceError when it cannot be read
 * @example
 * const file = "https://example.org/styles/ukiyo-e/pytorch_lora_weights.safetensors";
 * const adapter = await readDiffusers({ id: "ukiyo-e", file, tensors: file });
 */
export async function readDiffusers({ id, file, tensors: input, task }: DiffusersFiles): Promise<Adapter> {
  const metadata = readTaskMetadata(task, `${file}/task.json`);
  const tensors = await openSafetensors(input);
  try {
    const parts = sortKeys(tensors);
    const configs = configsOf(tensors, new Set([...parts.values()].map(({ prefix }) => prefix)));
    const alphas = await readAlphas(tensors, parts, configs.size > 0);
    const { modules, saved } = assemble(tensors, parts, configs, alphas);
    const named = [...configs];
    return {
      id,
      file,
      byteLength: tensors.byteLength,
      baseModel: common(named.map(([, { baseModel }]) => baseModel)),
      modules,
      saved,
      metadata: withRevision(metadata, common(named.map(([, { revision }]) => revision))),
      warnings: named.flatMap(([prefix, { warnings }]) =>
        warnings.map((text) => (prefix ? `${prefix}: ${text}` : text)),
      ),
      close: tensors.close,
    };
  } catch (error) {
    await tensors.close();
    throw error;
  }
}

/** The one value that there is; undefined where there are several, or none. */
function common(values: readonly (string | undefined)[]): string | undefined {
  const found = new Set(values.filter((value) => value !== undefined));
  return found.size === 1 ? [...found][0] : undefined;
}

const withRevision = (metadata: TaskMetadata, revision: string | undefined): TaskMetadata =>
  revision === undefined ? metadata : { ...metadata, revision };

/** The tensors of one module. */
interface ModuleParts {
  readonly prefix: string;
  readonly local: string;
  readonly keys: Map<KeyRole, string>;
  /** Key of its alpha. */
  alpha?: string;
}

/** Gives every tensor its module, sorted by name. @throws AdapterError for a tensor that has none, and for two that are the same */
function sortKeys(file: SafetensorsFile): Map<string, ModuleParts> {
  const refuse = refuser(file);
  for (const key of file.tensors.keys()) checkName(key, refuse);
  const bare = bareModel(file.tensors.keys());
  const parts = new Map<string, ModuleParts>();
  const unknown: string[] = [];
  for (const [key, { dtype }] of file.tensors) {
    const parsed = parseDiffusersKey(key, bare);
    if (parsed === undefined) {
      unknown.push(key);
      continue;
    }
    if (!isFloatDtype(dtype)) {
      throw refuse(key, `tensor ${key} is ${dtype}, expected F32, F16, BF16 or F64; save the adapter in one of these`);
    }
    const { module, prefix, local, part } = parsed;
    checkName(module, refuse);
    const found: ModuleParts = parts.get(module) ?? { prefix, local, keys: new Map() };
    parts.set(module, found);
    const other = part === "alpha" ? found.alpha : found.keys.get(part);
    if (other !== undefined) {
      throw refuse(key, `tensors ${other} and ${key} are the same one of two adapters; save one adapter at a time`);
    }
    if (part === "alpha") found.alpha = key;
    else found.keys.set(part, key);
  }
  if (unknown.length > 0) throw unknownError(unknown, refuse);
  if (parts.size === 0) throw new AdapterError("holds no tensors; save the adapter again", { file: file.name });
  return new Map([...parts].sort(([a], [b]) => compare(a, b)));
}

type Refuse = PeftTensors["refuse"];

const refuser =
  (file: SafetensorsFile): Refuse =>
  (field, message) =>
    new AdapterError(message, { file: file.name, field });

function unknownError(keys: readonly string[], refuse: Refuse): AdapterError {
  const foreign = foreignName(keys);
  if (foreign !== undefined) return refuse(foreign.name, `tensor ${foreign.name} ${foreign.message}`);
  const shown = keys.slice(0, 5).join(", ") + (keys.length > 5 ? `, and ${keys.length - 5} more` : "");
  const [known, bare] = [keys.filter((key) => prefixOf(key) !== ""), keys.filter((key) => prefixOf(key) === "")];
  if (bare.length > 0 && known.length === 0) {
    const expected = `expected names that begin with one of ${MODELS.join(", ")}`;
    return refuse(keys[0]!, `${shown}: ${expected}, as save_lora_weights of diffusers writes them; rename the tensors`);
  }
  return refuse(
    keys[0]!,
    `${shown}: not a part of a LoRA; expected lora_A and lora_B, lora.down and lora.up, or to_q_lora.down and up, of each ` +
      "module. Remove the tensors if the adapter works without them, or merge it into its base",
  );
}

/** The configurations in the header, by the prefix of the tensors they are for; empty where the header has none. */
function configsOf(file: SafetensorsFile, prefixes: ReadonlySet<string>): Map<string, PeftConfig> {
  const refuse = refuser(file);
  if (file.metadata.has(ALPHAS!)) {
    throw refuse(
      ALPHAS!,
      `the header has ${ALPHAS}; save each as a tensor of its own, "module.alpha", and leave it out`,
    );
  }
  const text = file.metadata.get(METADATA!);
  if (!text) return new Map();
  let json: unknown;
  try {
    json = parseJson(text);
  } catch (cause) {
    throw new AdapterError(`${METADATA} ${(cause as Error).message}; save the adapter again`, {
      file: file.name,
      cause,
    });
  }
  if (typeof json !== "object" || json === null || Array.isArray(json)) {
    throw refuse(METADATA!, `${METADATA} is not a JSON object; save the adapter again`);
  }
  const fields = new Map<string, Map<string, unknown>>([...prefixes].map((prefix) => [prefix, new Map()]));
  for (const [name, value] of Object.entries(json)) {
    const prefix = prefixOf(name);
    fields.get(prefix)?.set(prefix === "" ? name : name.slice(prefix.length + 1), value);
  }
  return new Map(
    [...fields].map(([prefix, found]) => {
      const where = `${file.name}, ${METADATA}${prefix && ` of ${prefix}`}`;
      const config = readPeftConfig({ peft_type: "LORA", ...Object.fromEntries(found) }, where);
      if (config.tokenRows.length > 0) {
        throw new AdapterError(
          "trainable_token_indices is set, but there are no rows in the file; save the adapter again",
          {
            file: where,
            field: "trainable_token_indices",
          },
        );
      }
      return [prefix, config];
    }),
  );
}

/** Alphas by module. @throws AdapterError for one that is no number, belongs to no module, or contradicts the header */
async function readAlphas(
  file: SafetensorsFile,
  parts: ReadonlyMap<string, ModuleParts>,
  configured: boolean,
): Promise<Map<string, number>> {
  const refuse = refuser(file);
  const alphas = new Map<string, number>();
  for (const [module, { alpha: key, keys }] of parts) {
    if (key === undefined) continue;
    if (keys.size === 0) throw refuse(key, `${key} is the alpha of ${module}, which has no factors; remove it`);
    if (configured) {
      throw refuse(key, `the file has ${key}, and ${METADATA} in its header: which is meant? Save it with one of them`);
    }
    const { shape } = file.tensors.get(key)!;
    if (shape.some((size) => size !== 1)) throw refuse(key, `${key} is [${shape.join(", ")}], expected one number`);
    const [value] = await file.readF32(key);
    if (!Number.isFinite(value))
      throw refuse(key, `${key} is ${value}, expected a number; take another copy of the file`);
    alphas.set(module, value!);
  }
  return alphas;
}

function assemble(
  file: SafetensorsFile,
  parts: ReadonlyMap<string, ModuleParts>,
  configs: ReadonlyMap<string, PeftConfig>,
  alphas: ReadonlyMap<string, number>,
): { modules: Map<string, AdapterModule>; saved: SavedTensor[] } {
  const modules = new Map<string, AdapterModule>();
  const saved: SavedTensor[] = [];
  checkDora(file, parts);
  for (const [name, { prefix, local, keys }] of parts) {
    const config = configs.get(prefix) ?? shownBy(file, keys, alphas.get(name));
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

/**
 * In a model where one module has a magnitude, diffusers gives the others that of the base, which is not in the file.
 * @throws AdapterError for a module without one
 */
function checkDora(file: SafetensorsFile, parts: ReadonlyMap<string, ModuleParts>): void {
  const dora = new Map<string, string>();
  for (const { prefix, keys } of parts.values()) if (keys.has("magnitude")) dora.set(prefix, keys.get("magnitude")!);
  for (const [name, { prefix, keys }] of parts) {
    const other = dora.get(prefix);
    if (other === undefined || keys.has("magnitude")) continue;
    const message = `module ${name} has no lora_magnitude_vector, but there is ${other}: the file is incomplete; save it again`;
    throw refuser(file)(other, message);
  }
}

/** What the tensors of a module say where the header says nothing. */
function shownBy(file: SafetensorsFile, keys: ReadonlyMap<KeyRole, string>, alpha: number | undefined): PeftConfig {
  const factor = keys.get("A") ?? keys.get("embeddingA");
  const rank = (factor && file.tensors.get(factor)!.shape[0]) || 1;
  return {
    baseModel: undefined,
    revision: undefined,
    taskType: undefined,
    fanInFanOut: false,
    bias: "none",
    loraBias: keys.has("loraBias"),
    dora: keys.has("magnitude"),
    modulesToSave: [],
    tokenRows: [],
    forModule: () => ({ rank, scale: (alpha ?? rank) / rank }),
    warnings: [],
  };
}
