/**
 * Reads a LoRA that llama.cpp's convert_lora_to_gguf.py wrote into the canonical form: names, orientation, and the order of rows that
 * llama.cpp changes for rotary embedding are those of transformers again. Portable: folders are read in folder.ts.
 */
import { type Derived, transposed, withDerived } from "../tensor/derived.ts";
import { type GgufFile, openGguf } from "../tensor/gguf.ts";
import { type Adapter, readAdapterFile } from "./adapter.ts";

import type { BaseFacts } from "./base-facts.ts";
import { ARCHITECTURES, EMBEDDING, type GgufArchitecture, generic, permuteRows } from "./gguf-names.ts";
import { assembleLora, type LoraKey, refuser, sortTensors } from "./named-lora.ts";
import type { PeftFiles } from "./peft.ts";
import { openFile } from "./safetensors.ts";

/** The file of one LoRA of llama.cpp; `tensors` is the GGUF file. */
export interface GgufFiles extends Omit<PeftFiles, "config" | "base"> {
  /** Heads of the base. Files of Llama's architecture need them, since they do not contain them. */
  readonly base?: BaseFacts | undefined;
}

/**
 * Opens an adapter: checks its header and the names, shapes and types of all tensors. Values are read, and checked, when a module's
 * `read` is called. F32, F16, BF16 and Q8_0 are read.
 * @throws AdapterError naming the field or tensor that cannot be represented, and what to do
 * @throws FormatError when the file breaks the GGUF format; SourceError when it cannot be read
 * @example
 * const base = { heads: 4, kvHeads: 2 }; // num_attention_heads and num_key_value_heads of the model's config.json
 * const adapter = await readGguf({ id: "rhymes", file: "rhymes.gguf", tensors: "rhymes.gguf", base });
 */
export async function readGguf({ base = {}, ...files }: GgufFiles): Promise<Adapter> {
  return readAdapterFile(
    files,
    (input) => openFile(input, openGguf, "a GGUF file"),
    (found) => {
      const { name, architecture } = architectureOf(found);
      const tensors = asTransformers(found, name, architecture, base);
      const expected = `no weight of ${name} that is known, with .weight.lora_a or .lora_b behind it`;
      const parts = sortTensors(
        tensors,
        (key) => parseKey(key, architecture),
        () => expected,
      );
      const alpha = alphaOf(found);
      const scaleOf = (_: string, rank: number): number => (alpha === 0 ? 1 : alpha / rank);
      return { ...assembleLora(tensors, parts, scaleOf), baseModel: textOf(found, "general.base_model.0.name") };
    },
  );
}

function textOf({ fields }: GgufFile, name: string): string | undefined {
  const found = fields.get(name);
  return typeof found === "string" && found !== "" ? found : undefined;
}

/** @throws AdapterError when it is no LoRA, or has an unknown architecture */
function architectureOf(file: GgufFile): { name: string; architecture: GgufArchitecture } {
  const refuse = refuser(file);
  for (const [field, expected] of [
    ["general.type", "adapter"],
    ["adapter.type", "lora"],
  ] as const) {
    const found = textOf(file, field);
    if (found !== expected)
      throw refuse(field, `${field} is ${found ?? "not there"}, expected ${expected}: not a LoRA of llama.cpp`);
  }
  if (file.fields.get("adapter.alora.invocation_tokens") !== undefined)
    throw refuse(
      "adapter.alora.invocation_tokens",
      "applies the update after some tokens only (aLoRA): no weight can. Train a plain LoRA",
    );
  const name = textOf(file, "general.architecture") ?? "not there";
  const architecture = ARCHITECTURES.get(name);
  if (architecture) return { name, architecture };
  const known = [...ARCHITECTURES.keys()].join(", ");
  throw refuse(
    "general.architecture",
    `general.architecture is ${name}, whose names and order of rows are not known; expected one of ${known}. Pack the adapter ` +
      "that it was converted from",
  );
}

function alphaOf(file: GgufFile): number {
  const alpha = file.fields.get("adapter.lora.alpha") ?? 0;
  if (typeof alpha === "number" && Number.isFinite(alpha)) return alpha;
  throw refuser(file)(
    "adapter.lora.alpha",
    `adapter.lora.alpha is ${String(alpha)}, expected a number; convert it again`,
  );
}

const SIDES: ReadonlyMap<string, "A" | "B"> = new Map([
  [".weight.lora_a", "A"],
  [".weight.lora_b", "B"],
]);

/** The weight that a tensor belongs to, and its factor. */
function split(key: string): { weight: string; side: "A" | "B" } | undefined {
  const at = key.lastIndexOf(".weight.");
  const side = SIDES.get(key.slice(at));
  return at < 1 || side === undefined ? undefined : { weight: key.slice(0, at), side };
}

function parseKey(key: string, { modules }: GgufArchitecture): LoraKey | undefined {
  const found = split(key);
  if (found === undefined) return undefined;
  const { pattern, layer } = generic(found.weight);
  const module = modules.get(pattern)?.replace("N", layer ?? "N");
  if (module === undefined) return undefined;
  const part = found.weight === EMBEDDING ? (`embedding${found.side}` as const) : found.side;
  return { prefix: "", local: module, module, part };
}

/** Gives a file the orientation and the order of rows that its weights have in transformers. */
function asTransformers(file: GgufFile, name: string, { permuted }: GgufArchitecture, base: BaseFacts): GgufFile {
  const derived = new Map<string, Derived>();
  for (const [key, { dtype, shape }] of file.tensors) {
    const { weight = "", side } = split(key) ?? {};
    // An embedding's rows are tokens, which are looked up: [vocabulary, r].
    if (weight === EMBEDDING && side === "A" && shape.length === 2) derived.set(key, transposed(file, key));
    const which = permuted.get(generic(weight).pattern);
    if (side !== "B" || which === undefined) continue;
    const heads = base[which];
    const [out = 0] = shape;
    if (heads === undefined || out % (2 * heads) !== 0) {
      const why =
        heads === undefined
          ? "the file does not say how many there are"
          : `${out} rows do not make ${heads} heads of an even number of rows`;
      const how = "Give the base (--base, or base): its folder, config.json or GGUF file";
      throw refuser(file)(key, `${key}: llama.cpp orders the rows of ${name} by heads, and ${why}. ${how}`);
    }
    const read: Derived["read"] = async (options) =>
      permuteRows(await file.readF32(key, options), out, heads, "out of pairs");
    derived.set(key, { dtype, shape, read });
  }
  return withDerived(file, derived);
}
