/** Bases of seeded values for modules of a pack. */
import type { FloatDtype, Tensor } from "eigenlora";
import { values } from "./backend-suite.ts";
import { encodeTensor, uniform } from "./internals/base.ts";
import { concat } from "./packs.ts";

type Modules = readonly { name: string; out: number; in: number }[];

/** A weight for each module, in memory, under the names of a checkpoint without "bert.". */
export function seededTensors(modules: Modules, dtype: FloatDtype): Map<string, Tensor> {
  const random = uniform(77);
  const tensors = new Map<string, Tensor>();
  for (const { name, out, in: inputs } of modules) {
    const data = encodeTensor(dtype, values(out * inputs, random), out, inputs);
    tensors.set(`${name.replace("bert.", "")}.weight`, {
      dtype,
      shape: [out, inputs],
      data: data.slice(0, out * inputs * (dtype === "f32" ? 4 : 2)),
    });
  }
  return tensors;
}

/** Seeded weights as a safetensors file, f32. */
export async function seededBase(modules: Modules): Promise<Uint8Array> {
  const header: Record<string, unknown> = {};
  const chunks: Uint8Array[] = [];
  let at = 0;
  for (const [name, { shape, data }] of seededTensors(modules, "f32")) {
    header[name] = { dtype: "F32", shape, data_offsets: [at, (at += data.byteLength)] };
    chunks.push(data as Uint8Array);
  }
  const text = new TextEncoder().encode(JSON.stringify(header));
  const length = new Uint8Array(8);
  new DataView(length.buffer).setBigUint64(0, BigInt(text.length), true);
  return concat([length, text, ...chunks]);
}
