/**
 * Reads a LoRA as diffusers saves it, one safetensors file for all models of a pipeline, into the canonical form.
 * Modules are named from the pipeline down: "unet.down_blocks.0.….attn1.to_q", whichever generation of diffusers wrote
 * the file. Without `lora_adapter_metadata` in the header, rank and DoRA follow from the tensors, and a module without
 * alpha has alpha = rank, as in diffusers. Portable: folders are read in folder.ts.
 */

import { AdapterError, isPlain } from "../errors.ts";
import { parseJson, type SafetensorsEntry, type SafetensorsFile, type TensorFile } from "../tensor/safetensors.ts";
import {
  type Adapter,
  type AdapterFactors,
  type AdapterFile,
  type Add,
  checkAdapter,
  type Exportable,
  f32Entry,
  factorsOf,
  openSafetensors,
  readAdapterFile,
  refuseModule,
  refuseSaved,
} from "./adapter.ts";
import { assembleLora, type LoraKey, type LoraParts, scalesOf, sortTensors } from "./named-lora.ts";
import { type KeyRole, parsePeftKey, refuser } from "./peft.ts";
import { CONVERT, type PeftConfig, readPeftConfig, withoutBase } from "./peft-config.ts";

/** Field of the header with configurations. */
const METADATA = "lora_adapter_metadata";
/** An argument of diffusers' functions, and no field: in files, tensors named "….alpha" hold it. */
const ALPHAS = "network_alphas";

/**
 * Opens an adapter: checks its header and the names, shapes and dtypes of all tensors, and reads the alphas. Other
 * values are read, and checked, when a module's `read` is called.
 * @throws AdapterError naming the field or tensor that cannot be represented, and what to do
 * @throws FormatError when the file breaks the safetensors format; SourceError when it cannot be read
 * @example
 * const file = "https://example.org/styles/ukiyo-e/pytorch_lora_weights.safetensors";
 * const adapter = await readDiffusers({ id: "ukiyo-e", file, tensors: file });
 */
export async function readDiffusers(files: AdapterFile): Promise<Adapter> {
  return readAdapterFile(files, openSafetensors, async (tensors, metadata) => {
    const bare = bareModel(tensors.tensors.keys());
    const parse = (name: string): LoraKey | undefined => parseDiffusersKey(name, bare);
    const parts = sortTensors(tensors, parse, expectedOf, foreignName);
    const configs = configsOf(tensors, new Set([...parts.values()].map(({ prefix }) => prefix)));
    for (const { alpha } of configs.size > 0 ? parts.values() : []) {
      if (alpha === undefined) continue;
      const both = `the file has ${alpha}, and ${METADATA} in its header: which is meant? Save it with one of them`;
      throw refuser(tensors)(alpha, both);
    }
    checkDora(tensors, parts);
    const scales = await scalesOf(tensors, parts);
    const named = [...configs];
    const revision = common(named.map(([, config]) => config.revision));
    return {
      ...assembleLora(tensors, parts, scales, ({ prefix }) => configs.get(prefix)),
      baseModel: common(named.map(([, { baseModel }]) => baseModel)),
      metadata: { ...metadata, ...(revision !== undefined && { revision }) },
    };
  });
}

/** The only value; undefined where there are several, or none. */
function common(values: readonly (string | undefined)[]): string | undefined {
  const found = new Set(values.filter((value) => value !== undefined));
  return found.size === 1 ? [...found][0] : undefined;
}

/** Says what names should be instead of these. */
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
  if (file.metadata.has(ALPHAS)) {
    throw refuse(
      ALPHAS,
      `the header has ${ALPHAS}; save each as a tensor of its own, "module.alpha", and leave it out`,
    );
  }
  const text = file.metadata.get(METADATA);
  if (!text) return new Map();
  let json: unknown;
  try {
    json = parseJson(text);
    if (!isPlain(json)) throw new SyntaxError("is not a JSON object");
  } catch (cause) {
    const message = `${METADATA} ${(cause as Error).message}; save the adapter again`;
    throw new AdapterError(message, { file: file.name, field: METADATA, cause });
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
      if (config.start)
        throw new AdapterError(`${withoutBase(config.start)}. ${CONVERT}`, { file: where, field: "init_lora_weights" });
      if (config.tokenRows.length > 0) {
        const message = "trainable_token_indices is set, but there are no rows in the file; save the adapter again";
        throw new AdapterError(message, { file: where, field: "trainable_token_indices" });
      }
      return [prefix, config];
    }),
  );
}

/**
 * Checks that DoRA covers each model whole: diffusers gives modules without a magnitude that of the base, which is not
 * in the file.
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

// Names of the tensors in a LoRA file of diffusers: the model of a pipeline and the module that each belongs to. Uses
// names only. Three generations are read, and give one name for one module:
// unet.down_blocks.0.….attn1.processor.to_out_lora.down.weight    2023, written by attention processors
// unet.down_blocks.0.….attn1.to_out.0.lora.down.weight            after it; text encoders have lora_linear_layer
// unet.down_blocks.0.….attn1.to_out.0.lora_A.weight               since PEFT unet.down_blocks.0.….attn1.to_out.0
//                      the module
// The mapping is that of diffusers 0.42 (utils/state_dict_utils.py, loaders/lora_base.py).

/** Models of a pipeline that diffusers loads LoRA into (`_lora_loadable_modules` of its pipelines). */
export const MODELS: readonly string[] = [
  "unet",
  "transformer",
  "transformer_2",
  "transformer_ref",
  "text_encoder",
  "text_encoder_2",
  "text_encoder_3",
  "text_conditioner",
  "connectors",
];

/** First segments that tell the model in names without one, as `save_attn_procs` and `save_lora_adapter` write them. */
const BARE: readonly (readonly [RegExp, string])[] = [
  [/^(down_blocks|mid_block|up_blocks)\./, "unet"],
  [/^(single_)?transformer_blocks\./, "transformer"],
];

/** Projections of attention in a UNet, and in CLIP, whose modules have other names than their processors had. */
const UNET: ReadonlyMap<string, string> = new Map([
  ["q", "to_q"],
  ["k", "to_k"],
  ["v", "to_v"],
  ["out", "to_out.0"],
]);
const CLIP: ReadonlyMap<string, string> = new Map([
  ["q", "q_proj"],
  ["k", "k_proj"],
  ["v", "v_proj"],
  ["out", "out_proj"],
]);

/** Copies of the base's own parameters, which no LoRA of diffusers holds. */
const COPIES: ReadonlySet<KeyRole> = new Set(["baseWeight", "baseBias"]);

/** The model that a name begins with; "" where it is unknown. */
function prefixOf(name: string): string {
  return MODELS.find((model) => name.startsWith(`${model}.`)) ?? "";
}

/** The model of a file whose names do not contain one; undefined where they do, or where none tells it. */
function bareModel(names: Iterable<string>): string | undefined {
  const all = [...names];
  if (all.some((name) => prefixOf(name) !== "")) return undefined;
  return BARE.find(([pattern]) => all.some((name) => pattern.test(name)))?.[1];
}

/**
 * Parses a tensor's name; undefined where diffusers gives no such name to a tensor of a LoRA.
 * @param bare the model of names without one
 */
function parseDiffusersKey(name: string, bare: string | undefined): LoraKey | undefined {
  const prefix = prefixOf(name);
  const model = prefix || bare;
  if (model === undefined) return undefined;
  const inner = prefix === "" ? name : name.slice(prefix.length + 1);
  if (!inner.endsWith(".alpha")) return parsePart(inner, prefix, model);
  // "module.alpha", or, from `network_alphas`, the name of the whole tensor with ".alpha" behind it.
  const owner = inner.slice(0, -".alpha".length);
  const spellings = [owner, `${owner}.down.weight`, `${owner}.lora_A.weight`];
  const known = spellings.map((spelling) => parsePart(spelling, prefix, model)).find((key) => key !== undefined);
  return known && { ...known, part: "alpha" };
}

function parsePart(name: string, prefix: string, model: string): LoraKey | undefined {
  const { name: local = "", part } = parsePeftKey(modernName(name, model)) ?? {};
  if (part === undefined || COPIES.has(part)) return undefined;
  return { prefix, local, module: `${model}.${withTextModel(local, model)}`, part };
}

/** Name of the tensor in diffusers since it uses PEFT. */
function modernName(name: string, model: string): string {
  const plain = name.replaceAll(".processor.", ".");
  const [, attention, projection, oldSide] = /^(.+)\.to_(q|k|v|out)_lora\.(down|up)\.weight$/.exec(plain) ?? [];
  if (attention !== undefined) {
    const names = model.startsWith("text_encoder") ? CLIP : UNET;
    return `${attention}.${names.get(projection!)!}.${factor(oldSide!)}`;
  }
  const [, module, side] = /^(.+)\.(?:lora|lora_linear_layer)\.(down|up)\.weight$/.exec(plain) ?? [];
  if (module !== undefined) return `${module}.${factor(side!)}`;
  return plain.replace(/\.to_out\.lora_magnitude_vector(?=\.|$)/, ".to_out.0.lora_magnitude_vector");
}

const factor = (side: string): string => (side === "down" ? "lora_A.weight" : "lora_B.weight");

/** Adds the level of CLIP's names that transformers 5 has dropped. With it, a name is found in models of both kinds. */
export function withTextModel(module: string, model: string): string {
  const flat = model.startsWith("text_encoder") && /^encoder\.layers\.\d+\.(self_attn|mlp\.fc[12])\b/.test(module);
  return flat ? `text_model.${module}` : module;
}

/** Tells whether names show a LoRA, in whatever format. */
export function holdsLora(names: Iterable<string>): boolean {
  for (const name of names) {
    if (
      /[._]lora_(A|B|down|up|mid|embedding_A)\b|[._]lora(_linear_layer)?\.(down|up)\.|\.(hada_w|lokr_w)\d/.test(name)
    ) {
      return true;
    }
  }
  return false;
}

const PLAIN = "Train a plain LoRA, or merge it into its base";

/** Names of other formats and of other kinds of adapter, the narrower first, with advice. */
const FOREIGN: readonly (readonly [RegExp, string])[] = [
  [/\.(hada_w|lokr_w|lokr_t|hada_t)\d/, `is of LyCORIS (LoHa or LoKr), which is no product of two factors. ${PLAIN}`],
  [
    /\.dora_scale$/,
    "is a DoRA scale of LyCORIS or kohya, which does not say over which side its norms go; diffusers leaves it out, and " +
      `then the result is another. ${PLAIN}`,
  ],
  [/\.(diff|diff_b|w_norm|b_norm|set_weight)$/, `is the difference of a whole parameter, not a LoRA of it. ${PLAIN}`],
  [
    /^(lora|lycoris)_[a-z0-9]+_|\.lora_(down|up|mid)\.weight$/,
    "is a name of kohya's, of no model that is known. Its names begin with lora_unet_, lora_te_, lora_te1_ or lora_te2_; readKohya reads " +
      "them",
  ],
  [/_custom_diffusion\./, "is of Custom Diffusion, which trains whole projections. Train a LoRA"],
  [/_lora\.(down|up)\.weight$/, "is of a projection that diffusers 0.42 does not load either. Leave it out"],
  [
    /^(model\.)?diffusion_model\./,
    "has the names of the model's original code. Load the file into its pipeline with diffusers and save it with " +
      "save_lora_weights",
  ],
  [
    /^base_model\.model\./,
    "is of PEFT. Put adapter_config.json beside the file, and call the file adapter_model.safetensors",
  ],
];

/** Finds a name that another format is known by, and the advice for it. */
export function foreignName(names: readonly string[]): { name: string; message: string } | undefined {
  for (const [pattern, message] of FOREIGN) {
    const name = names.find((candidate) => pattern.test(candidate));
    if (name !== undefined) return { name, message };
  }
  return undefined;
}

// Writes a canonical adapter with the same weights under the names of diffusers or of kohya. Scales stay in B: alpha
// equals the rank, which is what both assume where no alpha is given.

/**
 * Makes tensors of pytorch_lora_weights.safetensors (f32), as diffusers' `load_lora_weights` takes them. Holds one
 * adapter in memory.
 * @throws AdapterError for heads, biases, embeddings, and modules without the name of a model of a pipeline
 */
export function diffusersFile(adapter: Exportable): Promise<SafetensorsEntry[]> {
  return tensorsOf(adapter, "diffusersFile", "a LoRA file of diffusers", (add, module, { A, B, magnitude }) => {
    add(`${module}.lora_A.weight`, A.shape, A.values);
    add(`${module}.lora_B.weight`, B.shape, B.values);
    // PEFT's shape for convolutions: [1, out, 1…].
    const ones = A.shape.slice(2).map(() => 1);
    if (magnitude)
      add(
        `${module}.lora_magnitude_vector`,
        ones.length > 0 ? [1, magnitude.length, ...ones] : [magnitude.length],
        magnitude,
      );
  });
}

export async function tensorsOf(
  adapter: Exportable,
  where: string,
  format: string,
  put: (add: Add, module: string, factors: AdapterFactors) => void,
): Promise<SafetensorsEntry[]> {
  checkAdapter(where, adapter);
  refuseSaved(adapter, format);
  const tensors: SafetensorsEntry[] = [];
  const add: Add = (name, shape, values) => void tensors.push(f32Entry(name, shape, values));
  const bare = bareModel(adapter.modules.keys());
  for (const module of adapter.modules.values()) {
    const { name, layout } = module;
    if (layout === "embedding") throw refuseModule(adapter, name, `is an embedding, which ${format} has no place for`);
    if (prefixOf(name) === "" && bare === undefined)
      throw refuseModule(adapter, name, "does not begin with a model of a pipeline, such as unet or text_encoder");
    put(add, prefixOf(name) === "" ? `${bare}.${name}` : name, await factorsOf(module));
  }
  return tensors;
}
