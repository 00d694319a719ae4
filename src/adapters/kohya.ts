/**
 * Reads a LoRA as kohya's sd-scripts and LyCORIS save it, one safetensors file for all models of a pipeline, into the
 * canonical form: linear layers and convolutions, with or without a Tucker factor between (`lora_mid`), and with a
 * magnitude (`dora_scale`) if its norms go over outputs. Modules get diffusers' names. Portable: folders are read in
 * folder.ts.
 */

import { AdapterError } from "../errors.ts";
import type { SafetensorsEntry, TensorFile } from "../tensor/safetensors.ts";
import {
  type Adapter,
  type BasedAdapterFile,
  type Derived,
  type Exportable,
  openSafetensors,
  readAdapterFile,
  refuseModule,
  withDerived,
} from "./adapter.ts";
import { foreignName, tensorsOf } from "./diffusers.ts";
import { assembleLora, type LoraKey, scalesOf, sortTensors } from "./named-lora.ts";
import { type KeyRole, refuser } from "./peft.ts";

const PARTS: ReadonlyMap<string, KeyRole | "alpha"> = new Map([
  ["lora_down.weight", "A"],
  ["lora_up.weight", "B"],
  ["dora_scale", "magnitude"],
  ["alpha", "alpha"],
]);

export function isKohyaName(name: string): boolean {
  return (
    splitPrefix(name) !== undefined &&
    /^[^.]+\.(lora_(down|up|mid)\.weight|alpha|dora_scale|(hada|lokr)_\w+)$/.test(name)
  );
}

/**
 * Opens an adapter: checks the names, shapes and dtypes of all tensors, and reads the alphas. A module without alpha
 * has alpha = rank.
 * @throws AdapterError naming the tensor that cannot be represented, and what to do
 * @throws FormatError when the file breaks the safetensors format; SourceError when it cannot be read
 * @example
 * const adapter = await readKohya({ id: "ukiyo-e", file: "ukiyo-e.safetensors", tensors: "ukiyo-e.safetensors" });
 */
export async function readKohya({ base, ...files }: BasedAdapterFile): Promise<Adapter> {
  const names = base?.names && flatNames(base.names);
  return readAdapterFile(files, openSafetensors, async (found) => {
    const tensors = withPlainShapes(withoutTucker(found));
    const parse = (name: string): LoraKey | undefined => parseKey(name, names, found.name);
    const parts = sortTensors(tensors, parse, () => EXPECTED, foreignOf);
    const scales = await scalesOf(tensors, parts);
    return { ...assembleLora(tensors, parts, scales), baseModel: found.metadata.get("ss_sd_model_name") || undefined };
  });
}

function parseKey(name: string, names: FlatNames | undefined, file: string): LoraKey | undefined {
  const dot = name.indexOf(".");
  const part = PARTS.get(name.slice(dot + 1));
  const owner = splitPrefix(name.slice(0, dot));
  if (dot < 1 || part === undefined || owner === undefined) return undefined;
  const { model, flat } = owner;
  const local = (names && named(model, flat, names, file)) ?? unflatten(flat);
  return local === undefined ? undefined : { module: `${model}.${local}`, part };
}

/**
 * The base's name, which may begin with the model; undefined where it has none, as for another model of the pipeline.
 */
function named(model: string, flat: string, names: FlatNames, file: string): string | undefined {
  return moduleOf(`${model}_${flat}`, names, file)?.slice(model.length + 1) ?? moduleOf(flat, names, file);
}

const EXPECTED =
  "the module is not known, since kohya's names leave out the dots between its parts. Give the base that the adapter was trained on " +
  "(`base`), whose modules have them";

const foreignOf: typeof foreignName = (names) =>
  foreignName(names.filter((name) => !isKohyaName(name) || /\.(hada|lokr)_/.test(name)));

const [DOWN, MID] = [".lora_down.weight", ".lora_mid.weight"];

/**
 * Resolves LyCORIS' Tucker form: ΔW = up · mid ⊛ down, with mid [r, r, k…] and down [r, in, 1…]. The middle factor is
 * multiplied into the lower one, which is then [r, in, k…] as in any convolution.
 * @throws AdapterError when the shapes do not fit
 */
function withoutTucker<T extends TensorFile>(file: T): T {
  const derived = new Map<string, Derived>();
  const middles = [...file.tensors.keys()].filter((name) => name.endsWith(MID));
  for (const key of middles) {
    const below = key.slice(0, -MID.length) + DOWN;
    const down = file.tensors.get(below);
    const { dtype, shape } = file.tensors.get(key)!;
    const [rank = 0, inner = 0, ...kernel] = shape;
    const [rows, inputs = 0, ...ones] = down?.shape ?? [];
    if (rank !== inner || rows !== inner || ones.length !== kernel.length || ones.some((size) => size !== 1)) {
      const found = down ? `${below} is [${down.shape.join(", ")}]` : `there is no ${below}`;
      throw refuser(file)(key, `${key} is [${shape.join(", ")}], but ${found}; expected [r, r, k…] and [r, in, 1…]`);
    }
    const read = async (): Promise<Float32Array<ArrayBuffer>> =>
      tucker(await file.readF32(key), await file.readF32(below), rank, inputs);
    derived.set(below, { dtype, shape: [rank, inputs, ...kernel], read });
  }
  const found = withDerived(file, derived);
  const tensors = new Map([...found.tensors].filter(([name]) => !name.endsWith(MID)));
  return { ...found, tensors };
}

/** Multiplies mid [r, r, taps] and down [r, in] to [r, in, taps], in f64. */
function tucker(mid: Float32Array, down: Float32Array, rank: number, inputs: number): Float32Array<ArrayBuffer> {
  const taps = mid.length / rank ** 2;
  const out = new Float32Array(rank * inputs * taps);
  for (let r = 0; r < rank; r++) {
    for (let i = 0; i < inputs; i++) {
      for (let k = 0; k < taps; k++) {
        let sum = 0;
        for (let s = 0; s < rank; s++) sum += mid[(r * rank + s) * taps + k]! * down[s * inputs + i]!;
        out[(r * inputs + i) * taps + k] = sum;
      }
    }
  }
  return out;
}

/** Magnitudes in PEFT's shape, [out], or [1, out, 1…] of a convolution. @throws AdapterError for norms over inputs */
function withPlainShapes<T extends TensorFile>(file: T): T {
  const derived = new Map<string, Derived>();
  for (const [key, { dtype, shape }] of file.tensors) {
    if (!key.endsWith(".dora_scale")) continue;
    const up = file.tensors.get(key.replace(/dora_scale$/, "lora_up.weight"));
    const [out = 0, ...ones] = shape;
    if (up?.shape[0] !== out || ones.some((size) => size !== 1)) {
      throw refuser(file)(
        key,
        `${key} is [${shape.join(", ")}], expected one magnitude for each of ${up?.shape[0] ?? "no"} outputs: norms over inputs ` +
          "cannot be held. Train with wd_on_output=True, or merge the adapter into its base",
      );
    }
    const plain = up.shape.length > 2 ? [1, out, ...up.shape.slice(2).map(() => 1)] : [out];
    derived.set(key, { dtype, shape: plain, read: (options) => file.readF32(key, options) });
  }
  return withDerived(file, derived);
}

// Names of modules in kohya's LoRA files, where an underscore stands for every dot. Without the base's own list of
// modules they are split by the words that module names of Stable Diffusion's UNets and of CLIP consist of; no such
// name can be split in two ways. Files for SDXL have the names of its original code ("input_blocks_4_1"), which are
// translated as in diffusers 0.42 (loaders/lora_conversion_utils.py).

/** Prefixes of kohya and LyCORIS, and the models they stand for. */
const PREFIXES: readonly (readonly [string, string])[] = [
  ["lora_unet_", "unet"],
  ["lora_te1_", "text_encoder"],
  ["lora_te2_", "text_encoder_2"],
  ["lora_te3_", "text_encoder_3"],
  ["lora_te_", "text_encoder"],
  ["lora_transformer_", "transformer"],
  ["lycoris_unet_", "unet"],
  ["lycoris_", "unet"],
];

/** Words that contain underscores of their own. */
const WORDS: ReadonlySet<string> = new Set(
  (
    "down_blocks mid_block up_blocks attentions resnets transformer_blocks attn1 attn2 to_q to_k to_v to_out ff net proj proj_in " +
    "proj_out conv conv1 conv2 conv_in conv_out conv_shortcut time_emb_proj time_embedding add_embedding linear_1 linear_2 " +
    "downsamplers upsamplers text_model encoder layers self_attn q_proj k_proj v_proj out_proj mlp fc1 fc2 text_projection " +
    "embeddings token_embedding position_embedding"
  ).split(" "),
);
const MOST_PARTS = 4;

/** Splits a flattened name into the model of its prefix and the rest; undefined where it has no prefix. */
function splitPrefix(name: string): { model: string; flat: string } | undefined {
  const found = PREFIXES.find(([prefix]) => name.startsWith(prefix));
  return found && { model: found[1], flat: name.slice(found[0].length) };
}

/** The module of a flattened name; undefined where a word is unknown. */
export function unflatten(flat: string): string | undefined {
  const parts = (diffusersName(flat) ?? flat).split("_");
  const words: string[] = [];
  for (let at = 0; at < parts.length; ) {
    const digits = /^\d+$/.test(parts[at]!);
    let taken = digits ? 1 : Math.min(MOST_PARTS, parts.length - at);
    while (!digits && taken > 0 && !WORDS.has(parts.slice(at, at + taken).join("_"))) taken--;
    if (taken === 0) return undefined;
    words.push(parts.slice(at, at + taken).join("_"));
    at += taken;
  }
  return words.join(".");
}

/** Layers of a block in the original code of Stable Diffusion; equal in the UNets of all versions. */
const LAYERS = 2;

/** Names of the parts of a residual block in the original code. */
const RESNET: ReadonlyMap<string, string> = new Map([
  ["in_layers_2", "conv1"],
  ["out_layers_3", "conv2"],
  ["emb_layers_1", "time_emb_proj"],
  ["skip_connection", "conv_shortcut"],
]);
const OUTSIDE: ReadonlyMap<string, string> = new Map([
  ["input_blocks_0_0", "conv_in"],
  ["out_2", "conv_out"],
  ["time_embed_0", "time_embedding_linear_1"],
  ["time_embed_2", "time_embedding_linear_2"],
  ["label_emb_0_0", "add_embedding_linear_1"],
  ["label_emb_0_2", "add_embedding_linear_2"],
]);

/** Translates a flattened name of the original code to diffusers; undefined where it is none. */
function diffusersName(flat: string): string | undefined {
  const outside = OUTSIDE.get(flat);
  if (outside !== undefined) return outside;
  const [, blocks, first, second, rest = ""] =
    /^(input_blocks|output_blocks|middle_block)_(\d+)(?:_(\d+))?(?:_(.+))?$/.exec(flat) ?? [];
  if (blocks === undefined) return undefined;
  const i = Number(first);
  if (blocks === "middle_block") {
    const inner = [second, rest].filter(Boolean).join("_");
    if (i > 2) return undefined;
    return i === 1 ? `mid_block_attentions_0_${inner}` : `mid_block_resnets_${i / 2}_${RESNET.get(inner) ?? inner}`;
  }
  const down = blocks === "input_blocks";
  const at = down ? i - 1 : i;
  const block = `${down ? "down" : "up"}_blocks_${Math.floor(at / (LAYERS + 1))}`;
  if (down && rest === "op") return `${block}_downsamplers_0_conv`;
  if (!down && rest === "conv") return `${block}_upsamplers_0_conv`;
  const layer = at % (LAYERS + 1);
  return second === "0"
    ? `${block}_resnets_${layer}_${RESNET.get(rest) ?? rest}`
    : `${block}_attentions_${layer}_${rest}`;
}

/** kohya's name of a module of a model; undefined where kohya has no prefix for the model. */
export function flatten(module: string): string | undefined {
  const model = [...new Set(PREFIXES.map(([, model]) => model))].find((name) => module.startsWith(`${name}.`));
  if (model === undefined) return undefined;
  const prefix = model === "text_encoder" ? "lora_te1_" : PREFIXES.find(([, name]) => name === model)![0];
  return prefix + module.slice(model.length + 1).replaceAll(".", "_");
}

type FlatNames = ReadonlyMap<string, Iterable<string>>;

/** @param names of modules or parameters */
function flatNames(names: Iterable<string>): FlatNames {
  const found = new Map<string, Set<string>>();
  for (const name of names) {
    const module = name.replace(/\.(weight|bias)$/, "");
    const flat = module.replaceAll(".", "_");
    found.set(flat, (found.get(flat) ?? new Set()).add(module));
  }
  return found;
}

/** The only module with a flattened name; undefined where there is none. @throws AdapterError for several */
function moduleOf(flat: string, names: FlatNames, file: string): string | undefined {
  const [found, other] = names.get(flat) ?? [];
  if (found === undefined || other === undefined) return found;
  const message = `${flat} can be ${found} and ${other} of the base: rename the tensor with its dots`;
  throw new AdapterError(message, { file, field: flat });
}

/**
 * Makes tensors of a file as kohya's sd-scripts and LyCORIS save it (f32), with an alpha for every module. Holds one
 * adapter in memory.
 * @throws AdapterError as `diffusersFile`
 */
export function kohyaFile(adapter: Exportable): Promise<SafetensorsEntry[]> {
  return tensorsOf(adapter, "kohyaFile", "a file of kohya", (add, module, { A, B, magnitude }) => {
    const name = flatten(module);
    if (name === undefined) throw refuseModule(adapter, module, "is of a model that kohya has no prefix for");
    add(`${name}.lora_down.weight`, A.shape, A.values);
    add(`${name}.lora_up.weight`, B.shape, B.values);
    add(`${name}.alpha`, [], Float32Array.of(A.shape[0]!));
    if (magnitude) add(`${name}.dora_scale`, [magnitude.length, ...A.shape.slice(1).map(() => 1)], magnitude);
  });
}
