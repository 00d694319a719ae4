/**
 * Reads a LoRA as kohya's sd-scripts and LyCORIS save it, one safetensors file for all models of a pipeline, into the canonical form:
 * linear layers and convolutions, with or without a Tucker factor between (`lora_mid`), and with a magnitude (`dora_scale`) if its norms
 * go over outputs. Modules get diffusers' names. Portable: folders are read in folder.ts.
 */

import { type Derived, withDerived } from "../tensor/derived.ts";
import type { TensorFile } from "../tensor/tensor-file.ts";
import { type Adapter, readAdapterFile } from "./adapter.ts";
import { type BaseFacts, type FlatNames, flatNames, moduleOf } from "./base-facts.ts";
import { foreignName } from "./diffusers-keys.ts";
import { splitPrefix, unflatten } from "./kohya-names.ts";
import { assembleLora, type LoraKey, readAlphas, refuser, sortTensors } from "./named-lora.ts";
import type { PeftFiles } from "./peft.ts";
import type { KeyRole } from "./peft-keys.ts";
import { openSafetensors } from "./safetensors.ts";

/** The file of one LoRA of kohya or LyCORIS; `tensors` is the safetensors file. */
export interface KohyaFiles extends Omit<PeftFiles, "config" | "base"> {
  /** Names of the base's modules. Default: names are read as those of Stable Diffusion's UNets and of CLIP. */
  readonly base?: BaseFacts | undefined;
}

const PARTS: ReadonlyMap<string, KeyRole | "alpha"> = new Map([
  ["lora_down.weight", "A"],
  ["lora_up.weight", "B"],
  ["dora_scale", "magnitude"],
  ["alpha", "alpha"],
]);

/** Whether a tensor's name is one of kohya's. */
export function isKohyaName(name: string): boolean {
  return (
    splitPrefix(name) !== undefined &&
    /^[^.]+\.(lora_(down|up|mid)\.weight|alpha|dora_scale|(hada|lokr)_\w+)$/.test(name)
  );
}

/**
 * Opens an adapter: checks the names, shapes and dtypes of all tensors, and reads the alphas. A module without alpha has alpha = rank.
 * @throws AdapterError naming the tensor that cannot be represented, and what to do
 * @throws FormatError when the file breaks the safetensors format; SourceError when it cannot be read
 * @example
 * const adapter = await readKohya({ id: "ukiyo-e", file: "ukiyo-e.safetensors", tensors: "ukiyo-e.safetensors" });
 */
export async function readKohya({ base, ...files }: KohyaFiles): Promise<Adapter> {
  const names = base?.names && flatNames(base.names);
  return readAdapterFile(files, openSafetensors, async (found) => {
    const tensors = withPlainShapes(withoutTucker(found));
    const parse = (name: string): LoraKey | undefined => parseKey(name, names, found.name);
    const parts = sortTensors(tensors, parse, () => EXPECTED, foreignOf);
    const alphas = await readAlphas(tensors, parts);
    const scaleOf = (name: string, rank: number): number => (alphas.get(name) ?? rank) / rank;
    return { ...assembleLora(tensors, parts, scaleOf), baseModel: found.metadata.get("ss_sd_model_name") || undefined };
  });
}

function parseKey(name: string, names: FlatNames | undefined, file: string): LoraKey | undefined {
  const dot = name.indexOf(".");
  const part = PARTS.get(name.slice(dot + 1));
  const owner = splitPrefix(name.slice(0, dot));
  if (dot < 1 || part === undefined || owner === undefined) return undefined;
  const { model, flat } = owner;
  const local = (names && named(model, flat, names, file)) ?? unflatten(flat);
  return local === undefined ? undefined : { prefix: model, local, module: `${model}.${local}`, part };
}

/** The base's name, which may begin with the model; undefined where it has none, as for another model of the pipeline. */
function named(model: string, flat: string, names: FlatNames, file: string): string | undefined {
  return moduleOf(`${model}_${flat}`, names, file)?.slice(model.length + 1) ?? moduleOf(flat, names, file);
}

const EXPECTED =
  "the module is not known, since kohya's names leave out the dots between its parts. Give the base that the adapter was trained on " +
  "(--base, or base), whose modules have them";

const foreignOf: typeof foreignName = (names) =>
  foreignName(names.filter((name) => !isKohyaName(name) || /\.(hada|lokr)_/.test(name)));

const [DOWN, MID] = [".lora_down.weight", ".lora_mid.weight"];

/**
 * Resolves LyCORIS' Tucker form: ΔW = up · mid ⊛ down, with mid [r, r, k…] and down [r, in, 1…]. The middle factor is multiplied into the
 * lower one, which is then [r, in, k…] as in any convolution.
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
