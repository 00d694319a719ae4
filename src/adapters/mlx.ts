/**
 * Reads a LoRA or DoRA as MLX LM saves it, `adapter_config.json` and `adapters.safetensors`, into the canonical form. Factors in the file
 * are [in, r] and [r, out]; the configuration holds the scale itself. Portable: folders are read in folder.ts.
 */
import { AdapterError } from "../errors.ts";
import type { SourceInput } from "../source.ts";
import { type Derived, transposed, withDerived } from "../tensor/derived.ts";
import { show, type TensorFile } from "../tensor/tensor-file.ts";
import type { Adapter } from "./adapter.ts";
import { readTaskMetadata } from "./metadata.ts";
import { assembleLora, type LoraKey, listed, sortTensors } from "./named-lora.ts";
import { openSafetensors } from "./safetensors.ts";

/** The files of one adapter of MLX LM. */
export interface MlxFiles {
  /** Task id. */
  readonly id: string;
  /** The adapter's folder or address, for messages. */
  readonly file: string;
  /** Parsed adapter_config.json. */
  readonly config: unknown;
  /** adapters.safetensors: path, URL, Blob, bytes or ByteSource. Closed by the adapter's `close`. */
  readonly tensors: SourceInput;
  /** Parsed task.json, where there is one. */
  readonly task?: unknown;
}

/**
 * Opens an adapter: checks its configuration and the names, shapes and dtypes of all tensors. Values are read, and checked, when a
 * module's `read` is called.
 * @throws AdapterError naming the field or tensor that cannot be represented, and what to do
 * @throws FormatError when the tensor file breaks the safetensors format; SourceError when it cannot be read
 */
export async function readMlx({ id, file, config, tensors: input, task }: MlxFiles): Promise<Adapter> {
  const { scale, baseModel } = readConfig(config, `${file}/adapter_config.json`);
  const metadata = readTaskMetadata(task, `${file}/task.json`);
  const found = await openSafetensors(input);
  try {
    const tensors = asPeft(found);
    const parts = sortTensors(tensors, parseKey, (keys, refuse) =>
      refuse(
        keys[0]!,
        `${listed(keys)}: expected lora_a, lora_b and m of each module, as MLX LM saves them; save the adapter again`,
      ),
    );
    const { modules, saved } = assembleLora(
      tensors,
      parts,
      () => undefined,
      () => scale,
    );
    const { byteLength, close } = found;
    return { id, file, byteLength, baseModel, modules, saved, metadata, warnings: [], close };
  } catch (error) {
    await found.close();
    throw error;
  }
}

/** Whether a parsed adapter_config.json belongs to MLX LM. */
export function isMlxConfig(config: unknown): boolean {
  return typeof config === "object" && config !== null && ("lora_parameters" in config || "fine_tune_type" in config);
}

function readConfig(config: unknown, file: string): { scale: number; baseModel: string | undefined } {
  const refuse = (field: string, message: string): AdapterError => new AdapterError(message, { file, field });
  const { fine_tune_type: type = "lora", lora_parameters, model } = (config ?? {}) as Record<string, unknown>;
  if (type !== "lora" && type !== "dora") {
    throw refuse(
      "fine_tune_type",
      `fine_tune_type is ${show(type)}, expected "lora" or "dora": whole weights do not fit into a pack`,
    );
  }
  const scale = (lora_parameters as Record<string, unknown> | undefined | null)?.["scale"];
  if (typeof scale !== "number" || !Number.isFinite(scale)) {
    throw refuse("lora_parameters", `lora_parameters.scale is ${show(scale)}, expected a number, as MLX LM writes it`);
  }
  return { scale, baseModel: typeof model === "string" && model !== "" ? model : undefined };
}

/** Modules whose rows are tokens. */
const EMBEDDING = /(^|\.)(embed_tokens|word_embeddings|wte|tok_embeddings|embed_in)$/;

function parseKey(name: string): LoraKey | undefined {
  const [, module, what] = /^(.+)\.(lora_a|lora_b|m)$/.exec(name) ?? [];
  if (module === undefined) return undefined;
  const embedding = EMBEDDING.test(module);
  const part =
    what === "m" ? "magnitude" : what === "lora_a" ? (embedding ? "embeddingA" : "A") : embedding ? "embeddingB" : "B";
  return { prefix: "", local: module, module, part };
}

/** Transposes [in, r] and [r, out] to [r, in] and [out, r]; other shapes stay, and are refused with their module. */
function asPeft<T extends TensorFile>(file: T): T {
  const factors = [...file.tensors].filter(([name, { shape }]) => /\.lora_[ab]$/.test(name) && shape.length === 2);
  return withDerived(file, new Map(factors.map(([name]): [string, Derived] => [name, transposed(file, name)])));
}
