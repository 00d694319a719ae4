/**
 * Writes a canonical adapter with the same weights under the names of diffusers or of kohya. Scales stay in B: alpha equals the rank,
 * which is what both assume where no alpha is given.
 */
import type { SafetensorsEntry } from "../tensor/safetensors-writer.ts";
import { bareModel, prefixOf } from "./diffusers-keys.ts";
import { type AdapterFactors, type Exportable, f32Bytes, factorsOf, refuseModule, refuseSaved } from "./factors.ts";
import { flatten } from "./kohya-names.ts";
import { checkAdapter } from "./modules.ts";

type Add = (name: string, shape: readonly number[], values: Float32Array) => void;

/**
 * Makes tensors of pytorch_lora_weights.safetensors (f32), as diffusers' `load_lora_weights` takes them. Holds one adapter in memory.
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

/**
 * Makes tensors of a file as kohya's sd-scripts and LyCORIS save it (f32), with an alpha for every module. Holds one adapter in memory.
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

async function tensorsOf(
  adapter: Exportable,
  where: string,
  format: string,
  put: (add: Add, module: string, factors: AdapterFactors) => void,
): Promise<SafetensorsEntry[]> {
  checkAdapter(where, adapter);
  refuseSaved(adapter, format);
  const tensors: SafetensorsEntry[] = [];
  const add: Add = (name, shape, values) => {
    const bytes = f32Bytes(values);
    tensors.push({ name, dtype: "F32", shape: [...shape], read: () => bytes });
  };
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
