/**
 * Reads a LoRA or DoRA as MLX LM saves it, `adapter_config.json` and `adapters.safetensors`, into the canonical form. Factors in the file
 * are [in, r] and [r, out]; the configuration holds the scale itself. Portable: folders are read in folder.ts.
 */

import { AdapterError } from "../errors.ts";
import { show } from "../tensor/tensor-file.ts";
import { type Adapter, readAdapterFile } from "./adapter.ts";
import { assembleLora, type LoraKey, sortTensors, transposeMatrices } from "./named-lora.ts";
import type { PeftFiles } from "./peft.ts";
import { openSafetensors } from "./safetensors.ts";

/** The files of one adapter of MLX LM: adapter_config.json and, as `tensors`, adapters.safetensors. */
export type MlxFiles = Omit<PeftFiles, "base">;

/**
 * Opens an adapter: checks its configuration and the names, shapes and dtypes of all tensors. Values are read, and checked, when a
 * module's `read` is called.
 * @throws AdapterError naming the field or tensor that cannot be represented, and what to do
 * @throws FormatError when the tensor file breaks the safetensors format; SourceError when it cannot be read
 */
export async function readMlx({ config, ...files }: MlxFiles): Promise<Adapter> {
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
  const refuse = (field: string, message: string): AdapterError => new AdapterError(message, { file, field });
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
  return { prefix: "", local: module, module, part };
}
