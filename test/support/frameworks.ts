/**
 * Small models for hosts of frameworks: weights as in a checkpoint, packs of tasks on them, and the weights of each
 * task, folded by hand. Runs in browsers too.
 */
/// <reference types="@webgpu/types" />

import type { Runtime } from "eigenlora";
import { type Adapter, type AdapterModule, buildPack, type ModuleShape, type SavedTensor } from "eigenlora/build";
import { adapterOf } from "./adapters.ts";
import { uniform } from "./internals/base.ts";

/** Values of a parameter, row-major. */
export interface Values {
  readonly shape: readonly number[];
  readonly data: Float32Array;
}

/** A model's parameters by the names of a checkpoint. */
export type Weights = ReadonlyMap<string, Values>;

const LAYERS: readonly (ModuleShape & { readonly shape: readonly number[] })[] = [
  { name: "net.tokens", out: 6, in: 9, layout: "embedding", shape: [9, 6] },
  { name: "net.conv", out: 4, in: 27, layout: "conv", kernel: [3, 3], shape: [4, 3, 3, 3] },
  { name: "net.point", out: 6, in: 4, layout: "conv", kernel: [1, 1], shape: [6, 4, 1, 1] },
  { name: "net.query", out: 5, in: 6, layout: "out-in", shape: [5, 6] },
];

/** Modules that a task adapts, and the labels of its head. */
const TASKS: Readonly<Record<string, { readonly adapts: readonly string[]; readonly labels?: number }>> = {
  plain: { adapts: ["net.tokens", "net.point", "net.query"] },
  same: { adapts: ["net.tokens", "net.conv", "net.point", "net.query"], labels: 3 },
  more: { adapts: ["net.point", "net.query"], labels: 7 },
};

export const SELECTIONS = ["plain", "same", "more", null] as const;

const random = uniform(5);

function values(...shape: number[]): Values {
  const count = shape.reduce((a, b) => a * b, 1);
  return { shape, data: Float32Array.from({ length: count }, () => 2 * random() - 1) };
}

const base = new Map<string, Values>();
for (const { name, out, shape } of LAYERS) {
  base.set(`${name}.weight`, values(...shape));
  if (name !== "net.tokens") base.set(`${name}.bias`, values(out));
}
base.set("net.classifier.weight", values(3, 5));
base.set("net.classifier.bias", values(3));

const RANK = 2;
const terms = new Map<string, { readonly A: Float32Array; readonly Bt: Float32Array }>();
const heads = new Map<string, Values>();
for (const [task, { adapts, labels }] of Object.entries(TASKS)) {
  for (const { name, out, in: inputs } of LAYERS) {
    if (adapts.includes(name))
      terms.set(`${task} ${name}`, { A: values(RANK, inputs).data, Bt: values(RANK, out).data });
  }
  if (!labels) continue;
  heads.set(`${task} net.classifier.weight`, values(labels, 5));
  heads.set(`${task} net.classifier.bias`, values(labels));
}

/** Parameters of a model of some of the layers under a task, W0 + ΔW in f64, rounded once; null is the base. */
export function weightsOf(layers: readonly string[], task: string | null): Weights {
  const weights = new Map<string, Values>();
  for (const [name, { shape, data }] of base) {
    const layer = LAYERS.find((one) => name.startsWith(`${one.name}.`));
    if (layer && !layers.includes(layer.name)) continue;
    const head = heads.get(`${task} ${name}`);
    const term = name.endsWith(".weight") && layer && terms.get(`${task} ${layer.name}`);
    weights.set(name, head ?? { shape, data: term ? folded(layer, data, term) : data });
  }
  return weights;
}

function folded(
  { out, in: inputs, layout }: ModuleShape,
  weight: Float32Array,
  { A, Bt }: { readonly A: Float32Array; readonly Bt: Float32Array },
): Float32Array {
  return weight.map((value, at) => {
    const [row, column] =
      layout === "embedding" ? [at % out, Math.floor(at / out)] : [Math.floor(at / inputs), at % inputs];
    let sum = value;
    for (let r = 0; r < RANK; r++) sum += Bt[r * out + row]! * A[r * inputs + column]!;
    return sum;
  });
}

/** Packs those tasks on some of the layers, without loss. */
export async function packFor(layers: readonly string[]): Promise<Uint8Array<ArrayBuffer>> {
  const adapters = Object.entries(TASKS).map(([id, { adapts, labels }]): Adapter => {
    const modules = new Map<string, AdapterModule>();
    for (const layer of LAYERS) {
      if (!adapts.includes(layer.name) || !layers.includes(layer.name)) continue;
      modules.set(layer.name, {
        ...layer,
        rank: RANK,
        read: async () => ({ rank: RANK, ...terms.get(`${id} ${layer.name}`)! }),
      });
    }
    const saved = ["net.classifier.weight", "net.classifier.bias"].flatMap((name): SavedTensor[] => {
      const head = labels ? heads.get(`${id} ${name}`)! : undefined;
      return head ? [{ name, role: "saved", shape: head.shape, read: async () => head.data }] : [];
    });
    return adapterOf(id, modules.values(), { saved });
  });
  const { chunks } = await buildPack(adapters, {
    select: { kind: "energy", share: 1 },
    dtype: { basis: "f32", coefficients: "f32", head: "f32" },
  });
  return new Uint8Array(await new Blob(chunks as BlobPart[]).arrayBuffer());
}

/** Permutes the axes of an array. */
export function permuted({ shape, data }: Values, axes: readonly number[]): Values {
  const strides = shape.map((_, axis) => shape.slice(axis + 1).reduce((a, b) => a * b, 1));
  const to = axes.map((axis) => shape[axis]!);
  const out = new Float32Array(data.length);
  const index = to.map(() => 0);
  for (let i = 0; i < out.length; i++) {
    out[i] = data[axes.reduce((at, axis, k) => at + index[k]! * strides[axis]!, 0)]!;
    for (let k = to.length - 1; k >= 0 && ++index[k]! === to[k]; k--) index[k] = 0;
  }
  return { shape: to, data: out };
}

/** Transposes to the layout of TF.js and flax: kernels are [...window, in, out]. */
export function asKernel(values: Values): Values {
  const rank = values.shape.length;
  return rank < 2 ? values : permuted(values, [...Array.from({ length: rank - 2 }, (_, i) => i + 2), 1, 0]);
}

/** Numbers for inputs, from -1 to 1. */
export function inputs(count: number): Float32Array {
  const random = uniform(11);
  return Float32Array.from({ length: count }, () => 2 * random() - 1);
}

/** Seeded selections, never the same twice in a row. */
export function* selections(count: number): Iterable<(typeof SELECTIONS)[number]> {
  const random = uniform(3);
  let at = 0;
  for (let i = 0; i < count; i++) {
    at = (at + 1 + Math.floor(random() * (SELECTIONS.length - 1))) % SELECTIONS.length;
    yield SELECTIONS[at]!;
  }
}

/**
 * Bytes that cross the bus during the runtime's switches, and those of the active task's coefficients. Runs in a
 * browser.
 */
export async function trafficOf(
  { device, pack }: Runtime,
  work: () => Promise<{ readonly task: unknown }>,
): Promise<{ read: number; written: number; coefficients: number }> {
  const { queue } = device as GPUDevice;
  const { writeBuffer } = queue;
  const { mapAsync } = GPUBuffer.prototype;
  const traffic = { read: 0, written: 0, coefficients: 0 };
  queue.writeBuffer = (...of: Parameters<typeof writeBuffer>) => {
    // Start and size are in elements of a typed array.
    const { BYTES_PER_ELEMENT: element = 1 } = of[2] as Uint8Array;
    traffic.written += of[4] === undefined ? of[2].byteLength : of[4] * element;
    return writeBuffer.apply(queue, of);
  };
  GPUBuffer.prototype.mapAsync = function (...of) {
    traffic.read += this.size;
    return mapAsync.apply(this, of);
  };
  const { task } = await work();
  for (const { module, A, B } of typeof task === "string" ? (await pack.load(task)).terms : []) {
    const {
      A: [basisA],
      B: [basisB],
    } = pack.modules[module]!;
    traffic.coefficients += 4 * A!.tensor.rows * basisA!.tensor.rows + 4 * B!.tensor.rows * basisB!.tensor.rows;
  }
  queue.writeBuffer = writeBuffer;
  GPUBuffer.prototype.mapAsync = mapAsync;
  return traffic;
}
