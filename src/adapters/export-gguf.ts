/**
 * Writes a canonical adapter as a GGUF file with the same weights, which llama.cpp, wllama and llama.rn load beside a model of the same
 * architecture. Scales stay in B: an alpha of 0 means a scale of 1.
 */
import { AdapterError } from "../errors.ts";
import { transpose } from "../tensor/derived.ts";
import { type GgufEntry, writeGguf } from "../tensor/gguf-writer.ts";
import type { AdapterModule } from "./adapter.ts";
import type { BaseFacts } from "./base-facts.ts";
import { type Exportable, f32Bytes, factorsOf, refuseModule, refuseSaved } from "./factors.ts";
import { ARCHITECTURES, EMBEDDING, type GgufArchitecture, permuteRows } from "./gguf-names.ts";
import { checkAdapter } from "./modules.ts";

/**
 * Makes the bytes of a GGUF file (f32), chunk by chunk. Holds one adapter in memory.
 * @param base its architecture by llama.cpp's name ("llama", "qwen2"), and for "llama" its heads
 * @param marks more fields of the header. Default: none
 * @throws AdapterError for heads, biases, DoRA, convolutions, and modules that the architecture does not have
 * @example
 * const base = { architecture: "llama", heads: 4, kvHeads: 2 }; // of the model's config.json
 * await writeFile("rhymes.gguf", await ggufFile(await taskAdapter(writing, "rhymes"), base));
 */
export async function ggufFile(
  adapter: Exportable,
  base: BaseFacts,
  marks: ReadonlyMap<string, string> = new Map(),
): Promise<AsyncIterable<Uint8Array>> {
  checkAdapter("ggufFile", adapter);
  refuseSaved(adapter, "a GGUF file");
  const { architecture: name } = base;
  const architecture = ARCHITECTURES.get(name ?? "");
  if (name === undefined || architecture === undefined) {
    const found = name === undefined ? "is not known" : `"${name}" is none whose names are known`;
    const known = [...ARCHITECTURES.keys()].join(", ");
    throw new AdapterError(
      `the base's architecture ${found}; expected one of ${known}. Give the base (--base, or base): its config.json or GGUF file`,
      { file: adapter.id, field: "architecture" },
    );
  }
  const tensors: GgufEntry[] = [];
  for (const module of adapter.modules.values())
    tensors.push(...(await entriesOf(adapter, module, architecture, base)));
  const fields = new Map<string, string | number>([
    ["general.architecture", name],
    ["general.type", "adapter"],
    ["general.name", adapter.id],
    ["adapter.type", "lora"],
    ["adapter.lora.alpha", 0],
    ...marks,
  ]);
  return writeGguf(fields, tensors);
}

async function entriesOf(
  adapter: Exportable,
  module: AdapterModule,
  architecture: GgufArchitecture,
  base: BaseFacts,
): Promise<GgufEntry[]> {
  const { name, out, layout } = module;
  const found = weightOf(name, architecture);
  if (found === undefined) throw refuseModule(adapter, name, `is no weight of ${base.architecture} that is known`);
  const embedding = found.weight === EMBEDDING;
  if (layout !== (embedding ? "embedding" : "out-in"))
    throw refuseModule(adapter, name, `is stored as ${layout}, which GGUF has no place for`);
  const { A, B, magnitude } = await factorsOf(module);
  if (magnitude) throw refuseModule(adapter, name, "has a magnitude (DoRA), which llama.cpp does not apply");
  const [rank = 1, inputs = 0] = A.shape;
  const which = architecture.permuted.get(found.pattern);
  const heads = which && base[which];
  if (which && (heads === undefined || out % (2 * heads) !== 0)) {
    throw new AdapterError(
      `${name}: its ${out} rows are ordered by heads, and ${heads ?? "no"} heads are known; give the base`,
      {
        file: adapter.id,
        field: name,
      },
    );
  }
  // An embedding's A is [vocabulary, r], since its rows are looked up.
  const a = embedding ? transpose(A.values, rank, inputs) : A.values;
  const b = heads ? permuteRows(B.values, out, heads, "into pairs") : B.values;
  const entry = (side: string, shape: readonly number[], values: Float32Array): GgufEntry => ({
    name: `${found.weight}.weight.lora_${side}`,
    shape,
    bytes: f32Bytes(values),
  });
  return [entry("a", embedding ? [inputs, rank] : [rank, inputs], a), entry("b", B.shape, b)];
}

/** GGUF's name of a module. The module's name may have more in front than the architecture's. */
function weightOf(name: string, { modules }: GgufArchitecture): { weight: string; pattern: string } | undefined {
  for (const [pattern, module] of modules) {
    const [before = "", after] = module.split("N");
    const at = `.${name}`.indexOf(`.${before}`);
    if (at < 0) continue;
    const rest = name.slice(at + before.length);
    if (after === undefined ? rest === "" : rest.endsWith(after) && /^\d+$/.test(rest.slice(0, -after.length)))
      return { weight: pattern.replace("N", after === undefined ? "N" : rest.slice(0, -after.length)), pattern };
  }
  return undefined;
}
