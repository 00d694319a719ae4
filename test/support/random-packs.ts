/**
 * Seeded packs with every kind of task, including tasks that bring whole what others adapt; a base for them; selections
 * of them.
 */
import type { FloatDtype, Selection, Tensor } from "eigenlora";
import { type Adapter, type AdapterModule, buildPack, type ModuleShape, type SavedTensor } from "eigenlora/build";
import { adapterOf, save } from "./adapters.ts";
import { encodeTensor, shuffle, uniform } from "./internals/base.ts";
import { concat } from "./packs.ts";

/** Adapted modules; the base calls them without "model.". */
export const MODULES: readonly (ModuleShape & { readonly shape: readonly number[] })[] = [
  { name: "model.emb", out: 4, in: 9, layout: "embedding", shape: [9, 4] },
  { name: "model.enc.conv", out: 4, in: 8, layout: "conv", kernel: [2, 2], shape: [4, 2, 2, 2] },
  { name: "model.enc.q", out: 6, in: 5, layout: "out-in", shape: [6, 5] },
  { name: "model.enc.turned", out: 5, in: 5, layout: "in-out", shape: [5, 5] },
  { name: "model.head", out: 3, in: 6, layout: "out-in", shape: [3, 6] },
];
const BIASES = ["model.enc.q", "model.head", "model.norm"];
const WIDTH = 6;

/** Seeded random choices. */
export interface Chance {
  (): number;
  of<T>(items: readonly T[]): T;
  /** Random numbers from -1 to 1. */
  values(count: number): Float32Array;
}

export function chance(seed: number): Chance {
  const random = uniform(seed);
  return Object.assign(() => random(), {
    of: <T>(items: readonly T[]): T => items[Math.floor(random() * items.length)]!,
    values: (count: number): Float32Array => Float32Array.from({ length: count }, () => 2 * random() - 1),
  });
}

function sizeOf(shape: readonly number[]): number {
  return shape.reduce((a, b) => a * b, 1);
}

export function randomBase(seed: number, dtype: FloatDtype): Map<string, Tensor> {
  const { values } = chance(seed);
  const shapes = new Map(MODULES.map(({ name, shape }) => [`${name}.weight`, shape]));
  for (const name of BIASES) shapes.set(`${name}.bias`, [name === "model.head" ? 3 : WIDTH]);
  shapes.set("model.norm.weight", [WIDTH]);
  return new Map(
    [...shapes].map(([name, shape]) => {
      const count = sizeOf(shape);
      const data = encodeTensor(dtype, values(count), 1, count).slice(0, count * (dtype === "f32" ? 4 : 2));
      return [name.replace("model.", ""), { dtype, shape, data }];
    }),
  );
}

function randomTask(id: string, chance: Chance): Adapter {
  const { of, values } = chance;
  const modules = new Map<string, AdapterModule>();
  const saved: SavedTensor[] = [];
  const add = (name: string, role: SavedTensor["role"], shape: readonly number[], indices?: readonly number[]) =>
    void saved.push(save(values, name, role, shape, indices));
  for (const module of MODULES) {
    const { name, out, in: inputs, shape, layout } = module;
    const does = of(["adapts", "adapts", "adapts", "dora", "replaces", "nothing"]);
    if (does === "replaces") {
      if (layout !== "embedding" || of([true, false])) add(`${name}.weight`, "saved", shape);
      else add(`${name}.weight`, "rows", [2, 4], [of([0, 1, 2]), of([3, 8])]);
    } else if (does !== "nothing") {
      const rank = of([1, 2, 3]);
      const term = { rank, A: values(rank * inputs), Bt: values(rank * out) };
      const magnitude = does === "dora" && layout !== "embedding" ? { magnitude: values(out).map(Math.abs) } : {};
      modules.set(name, { ...module, rank, read: async () => ({ ...term, ...magnitude }) });
    }
  }
  // Every task adapts something.
  if (modules.size === 0) return randomTask(id, chance);
  for (const name of BIASES) {
    const role = of(["saved", "bias", "bias-delta", undefined, undefined] as const);
    if (role) add(`${name}.bias`, role, [name === "model.head" ? 3 : WIDTH]);
  }
  if (of([true, false])) add("model.norm.weight", "saved", [WIDTH]);
  const labels = of([
    ["a", "b"],
    ["a", "b"],
    ["a", "b", "c", "d"],
  ]);
  if (of([true, false])) add("model.classifier.weight", "saved", [labels.length, WIDTH]);
  return adapterOf(id, modules.values(), { saved, metadata: { labels } });
}

/** A pack of five such tasks; every other one without components. */
export async function randomPack(seed: number): Promise<{ bytes: Uint8Array<ArrayBuffer>; ids: string[] }> {
  const random = chance(seed);
  const ids = ["a", "b", "c", "d", "e"];
  const f32 = { basis: "f32", coefficients: "f32", head: "f32" } as const;
  const own = seed % 2 ? ({ select: { kind: "k", k: 0 } } as const) : {};
  const { chunks } = await buildPack(
    ids.map((id) => randomTask(id, random)),
    { dtype: f32, ...own },
  );
  return { bytes: concat(chunks), ids };
}

/** A selection for `switchTask`. */
export interface Wanted {
  readonly selection: Selection;
  readonly head?: string;
}

export function randomSelection(ids: readonly string[], { of }: Chance): Wanted {
  const kind = of(["task", "task", "task", "null", "scaled", "blend", "blend", "blend"]);
  if (kind === "null") return { selection: null };
  if (kind === "task") return { selection: of(ids) };
  if (kind === "scaled") return { selection: { [of(ids)]: of([1, 0.5, -2]) } };
  const some = shuffle([...ids], () => of([0, 0.1, 0.3, 0.5, 0.7, 0.9])).slice(0, of([2, 3]));
  const selection = Object.fromEntries(some.map((id) => [id, of([1, 0.5, 0.25, -1])]));
  return of([true, false, true]) ? { selection, head: of(some) } : { selection };
}
