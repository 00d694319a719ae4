/** Shared by tests of adapters: files made from a few shapes, and adapters in memory. */
import type { Term } from "eigenlora";
import type { Adapter, AdapterModule, SavedTensor } from "eigenlora/build";
import { f32ToBf16, f32ToF16, type SafetensorsEntry, writeSafetensors } from "./internals/base.ts";
import { allOf } from "./internals/pack.ts";

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

/** Seeded values of a length. */
type Values = (count: number) => Float32Array;

/** A module of rank 2 with values of its own. */
export function lora(
  values: Values,
  name: string,
  out: number,
  inputs: number,
  { layout = "out-in", magnitude = false }: { layout?: AdapterModule["layout"]; magnitude?: boolean } = {},
): AdapterModule {
  const term = { rank: 2, A: values(2 * inputs), Bt: values(2 * out) };
  const scales = magnitude && { magnitude: values(out).map((value) => 1 + Math.abs(value)) };
  return { ...linear(name, out, inputs, { ...term, ...scales }), layout };
}

/** A parameter that a task stores. @param indices of rows */
export function save(
  values: Values,
  name: string,
  role: SavedTensor["role"],
  shape: readonly number[],
  indices?: readonly number[],
): SavedTensor {
  const value = values(shape.reduce((a, b) => a * b, 1));
  return { name, role, shape, indices, read: async () => value };
}

/** The adapter with other factors. */
export function withTerms(adapter: Adapter, change: (term: Term, name: string, index: number) => Term): Adapter {
  const modules = [...adapter.modules].map(([name, module], index) => {
    const read = async (): Promise<Term> => change(await module.read(), name, index);
    return [name, { ...module, read }] as const;
  });
  return { ...adapter, modules: new Map(modules) };
}

/** The adapter with its first modules alone. */
export function firstModules(adapter: Adapter, count: number): Adapter {
  return { ...adapter, modules: new Map([...adapter.modules].slice(0, count)) };
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
  return new Uint8Array(Buffer.concat(await allOf(writeSafetensors(entries, metadata))));
}
