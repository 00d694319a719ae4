/** Shared by tests of adapters: files made from a few shapes, and adapters in memory. */
import type { Term } from "eigenlora";
import type { Adapter, AdapterModule } from "eigenlora/build";
import { f32ToBf16, f32ToF16, type SafetensorsEntry, writeSafetensors } from "./internals/base.ts";

/** An adapter made in memory. */
export function adapterOf(id: string, modules: Iterable<AdapterModule>, more: Partial<Adapter> = {}): Adapter {
  return {
    ...{ id, file: id, byteLength: 0, baseModel: undefined, saved: [], metadata: {}, warnings: [] },
    ...{ modules: new Map([...modules].map((module) => [module.name, module])), close: async () => undefined },
    ...more,
  };
}

/** A linear module [out, in] with these factors. */
export function linear(name: string, out: number, inputs: number, term: Term): AdapterModule {
  return { name, out, in: inputs, layout: "out-in", rank: term.rank, read: async () => term };
}

export async function readAll(adapter: Adapter): Promise<void> {
  for (const module of adapter.modules.values()) await module.read();
  for (const tensor of adapter.saved) await tensor.read();
}

/** Tensors by name: shape, first value, number format. Values count up from the first one. */
export type Spec = Record<string, [shape: number[], start?: number, dtype?: "F32" | "F16" | "BF16" | "F64" | "I64"]>;

export const entries = (spec: Spec): SafetensorsEntry[] =>
  Object.entries(spec).map(([name, tensor]) => entry(name, tensor));

function entry(name: string, [shape, start = 1, dtype = "F32"]: Spec[string]): SafetensorsEntry {
  const count = shape.reduce((a, b) => a * b, 1);
  const values = Array.from({ length: count }, (_, i) => start + i);
  const read = (): Uint8Array => {
    if (dtype === "F16") return new Uint8Array(Uint16Array.from(values, f32ToF16).buffer);
    if (dtype === "BF16") return new Uint8Array(Uint16Array.from(values, f32ToBf16).buffer);
    if (dtype === "F64") return new Uint8Array(Float64Array.from(values).buffer);
    if (dtype === "I64") return new Uint8Array(8 * count);
    return new Uint8Array(Float32Array.from(values).buffer);
  };
  return { name, dtype, shape, read };
}

export async function bytesOf(
  entries: SafetensorsEntry[],
  metadata: ReadonlyMap<string, string> = new Map([["format", "pt"]]),
): Promise<Uint8Array> {
  const chunks: Uint8Array[] = [];
  for await (const chunk of writeSafetensors(entries, metadata)) chunks.push(chunk);
  return new Uint8Array(Buffer.concat(chunks));
}
