/** Shared by tests of adapter readers: files made from a few shapes, and an adapter's weights by the definitions. */
import type { Term } from "eigenlora";
import type { Adapter, AdapterModule } from "eigenlora/build";
import { f32ToBf16, f32ToF16, type SafetensorsEntry, writeSafetensors } from "./internals/base.ts";

export interface Tensor {
  shape: readonly number[];
  data: ArrayLike<number>;
}

/** The golden base's name for a parameter of an adapter. */
function baseName(parameter: string, base: ReadonlyMap<string, Tensor>): string {
  const endsWith = (long: string, short: string): boolean => `.${long}`.endsWith(`.${short}`);
  const names = [...base.keys()].filter((name) => endsWith(name, parameter) || endsWith(parameter, name));
  if (names.length !== 1) throw new Error(`${parameter} is ${names.length} parameters of the base`);
  return names[0]!;
}

/**
 * Computes W0 + B·A with everything an adapter can carry, by the definitions and in f64. Returns only tensors that the adapter changes.
 */
export async function apply(adapter: Adapter, base: ReadonlyMap<string, Tensor>): Promise<Map<string, number[]>> {
  const merged = new Map<string, number[]>();
  for (const { name, role, indices, read } of adapter.saved) {
    const parameter = baseName(name, base);
    const before = Array.from(base.get(parameter)!.data);
    const values = Array.from(await read());
    if (role === "bias-delta")
      merged.set(
        parameter,
        before.map((value, i) => value + values[i]!),
      );
    else if (role === "rows") {
      const width = base.get(parameter)!.shape[1]!;
      indices!.forEach((row, i) => before.splice(row * width, width, ...values.slice(i * width, (i + 1) * width)));
      merged.set(parameter, before);
    } else merged.set(parameter, values);
  }
  for (const module of adapter.modules.values()) {
    const parameter = baseName(`${module.name}.weight`, base);
    merged.set(parameter, await applyModule(module, base.get(parameter)!));
  }
  return merged;
}

async function applyModule(module: AdapterModule, { shape, data }: Tensor): Promise<number[]> {
  const { out, in: width, rank, layout, kernel } = module;
  const { A, Bt, magnitude } = await module.read();
  if (A.length !== rank * width || Bt.length !== rank * out) throw new Error(`${module.name}: wrong sizes`);
  const transposed = layout === "in-out" || layout === "embedding";
  const expected = transposed ? [width, out] : [out, width];
  const found = layout === "conv" ? [shape[0]!, shape.slice(1).reduce((a, b) => a * b, 1)] : shape;
  if (expected.join() !== found.join() || (layout === "conv" && kernel!.join() !== shape.slice(2).join())) {
    throw new Error(`${module.name}: ${layout} [${expected.join()}] does not fit [${shape.join()}]`);
  }
  const at = (i: number, j: number): number => (transposed ? j * out + i : i * width + j);
  const weight = Array.from(data);
  for (let i = 0; i < out; i++) {
    let square = 0;
    for (let j = 0; j < width; j++) {
      for (let k = 0; k < rank; k++) weight[at(i, j)]! += Bt[k * out + i]! * A[k * width + j]!;
      square += weight[at(i, j)]! ** 2;
    }
    if (magnitude) for (let j = 0; j < width; j++) weight[at(i, j)]! *= magnitude[i]! / Math.sqrt(square);
  }
  return weight;
}

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
