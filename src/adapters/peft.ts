/**
 * Reads an adapter as PEFT saves it, `adapter_config.json` and `adapter_model.safetensors`, into the canonical form. Rank and scale of a
 * module come from the same fields and patterns as in PEFT. A file that PEFT would not load, or would load in part only, is refused.
 * Portable: folders are read in folder.ts.
 */
import { checkOptions } from "../arguments.ts";
import type { BaseInput } from "../core/base.ts";
import { openHost } from "../core/open-base.ts";
import { AdapterError } from "../errors.ts";
import type { TaskMetadata } from "../format/format.ts";
import { misfitLabels } from "../format/heads.ts";
import type { SourceInput } from "../source.ts";
import { type Adapter, type AdapterModule, readAdapterFile, type SavedTensor } from "./adapter.ts";
import { compare } from "./modules.ts";
import { type PeftConfig, readPeftConfig } from "./peft-config.ts";
import { readModule } from "./peft-module.ts";
import { type PeftTensors, type Places, peftTensors, place } from "./peft-places.ts";
import { openSafetensors } from "./safetensors.ts";

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
