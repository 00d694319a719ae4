/** Bases of seeded values for modules of a pack. */
import type { FloatDtype, Tensor } from "eigenlora";
import { bytesOf } from "./adapters.ts";
import { values } from "./backend-suite.ts";
import { encodeTensor, uniform } from "./internals/base.ts";

type Modules = readonly { name: string; out: number; in: number }[];

/** A weight for each module, in memory, under the names of a checkpoint without "bert.". */
export function seededTensors(modules: Modules, dtype: FloatDtype): Map<string, Tensor> {
  const random = uniform(77);
  const tensors = new Map<string, Tensor>();
  for (const { name, out, in: inputs } of modules) {
    const { buffer } = encodeTensor(dtype, values(out * inputs, random), out, inputs).slice();
    const data = dtype === "f32" ? new Float32Array(buffer) : new Uint16Array(buffer, 0, out * inputs);
    tensors.set(`${name.replace("bert.", "")}.weight`, { dtype, shape: [out, inputs], data });
  }
  return tensors;
}

/** Seeded weights as a safetensors file, f32. */
export function seededBase(modules: Modules): Promise<Uint8Array> {
  const tensors = [...seededTensors(modules, "f32")];
  return bytesOf(
    tensors.map(([name, { shape, data }]) => ({ name, dtype: "F32", shape, read: () => new Uint8Array(data.buffer) })),
  );
}
