/**
 * Reads a LoRA as diffusers saves it, one safetensors file for all models of a pipeline, into the canonical form. Modules are named from
 * the pipeline down: "unet.down_blocks.0.….attn1.to_q", whichever generation of diffusers wrote the file. Without `lora_adapter_metadata`
 * in the header, rank and DoRA follow from the tensors, and a module without alpha has alpha = rank, as in diffusers. Portable: folders
 * are read in folder.ts.
 */

import { AdapterError } from "../errors.ts";
import type { TaskMetadata } from "../format/format.ts";
import type { SafetensorsFile } from "../tensor/safetensors.ts";
import { parseJson, type TensorFile } from "../tensor/tensor-file.ts";
import { type Adapter, readAdapterFile } from "./adapter.ts";
import { bareModel, foreignName, MODELS, parseDiffusersKey, prefixOf } from "./diffusers-keys.ts";
import { assembleLora, type LoraKey, type LoraParts, readAlphas, refuser, sortTensors } from "./named-lora.ts";
import type { PeftFiles } from "./peft.ts";
import { CONVERT, type PeftConfig, readPeftConfig, withoutBase } from "./peft-config.ts";
import { openSafetensors } from "./safetensors.ts";

/** The file of one LoRA of diffusers; `tensors` is pytorch_lora_weights.safetensors. */
export type DiffusersFiles = Omit<PeftFiles, "config" | "base">;

/** Fields of the header. The second is an argument of diffusers' functions; in files, tensors named "….alpha" hold it. */
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
export async function readDiffusers(files: DiffusersFiles): Promise<Adapter> {
  return readAdapterFile(files, openSafetensors, async (tensors, metadata) => {
    const bare = bareModel(tensors.tensors.keys());
    const parse = (name: string): LoraKey | undefined => parseDiffusersKey(name, bare);
    const parts = sortTensors(tensors, parse, expectedOf, foreignName);
    const configs = configsOf(tensors, new Set([...parts.values()].map(({ prefix }) => prefix)));
    if (configs.size > 0) refuseAlphas(tensors, parts);
    checkDora(tensors, parts);
    const alphas = await readAlphas(tensors, parts);
    const scaleOf = (name: string, rank: number): number => (alphas.get(name) ?? rank) / rank;
    const named = [...configs];
    return {
      ...assembleLora(tensors, parts, scaleOf, ({ prefix }) => configs.get(prefix)),
      baseModel: common(named.map(([, { baseModel }]) => baseModel)),
      metadata: withRevision(metadata, common(named.map(([, { revision }]) => revision))),
      warnings: named.flatMap(([prefix, { warnings }]) =>
        warnings.map((text) => (prefix ? `${prefix}: ${text}` : text)),
      ),
    };
  });
}

/** @throws AdapterError for an alpha beside a header that has all of them */
function refuseAlphas(file: TensorFile, parts: ReadonlyMap<string, LoraParts>): void {
  for (const { alpha: key } of parts.values()) {
    if (key === undefined) continue;
    throw refuser(file)(
      key,
      `the file has ${key}, and ${METADATA} in its header: which is meant? Save it with one of them`,
    );
  }
}

/** The only value; undefined where there are several, or none. */
function common(values: readonly (string | undefined)[]): string | undefined {
  const found = new Set(values.filter((value) => value !== undefined));
  return found.size === 1 ? [...found][0] : undefined;
}

const withRevision = (metadata: TaskMetadata, revision: string | undefined): TaskMetadata =>
  revision === undefined ? metadata : { ...metadata, revision };

/** What names should be instead of these. */
function expectedOf(keys: readonly string[]): string {
  if (keys.every((key) => prefixOf(key) === ""))
    return `expected names that begin with one of ${MODELS.join(", ")}, as save_lora_weights of diffusers writes them; rename the tensors`;
  return (
    "not a part of a LoRA; expected lora_A and lora_B, lora.down and lora.up, or to_q_lora.down and up, of each module. Remove the " +
    "tensors if the adapter works without them, or merge it into its base"
  );
}

/** Configurations in the header, by prefix of their tensors; empty where the header has none. */
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
      if (config.start) {
        const field = "init_lora_weights";
        throw new AdapterError(`${withoutBase(config.start)}. ${CONVERT}`, { file: where, field });
      }
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

/**
 * Checks that DoRA covers each model whole: diffusers gives modules without a magnitude that of the base, which is not in the file.
 * @throws AdapterError for a module without one
 */
function checkDora(file: TensorFile, parts: ReadonlyMap<string, LoraParts>): void {
  const dora = new Map<string, string>();
  for (const { prefix, keys } of parts.values()) if (keys.has("magnitude")) dora.set(prefix, keys.get("magnitude")!);
  for (const [name, { prefix, keys }] of parts) {
    const other = dora.get(prefix);
    if (other === undefined || keys.has("magnitude")) continue;
    const message = `module ${name} has no lora_magnitude_vector, but there is ${other}: the file is incomplete; save it again`;
    throw refuser(file)(other, message);
  }
}
