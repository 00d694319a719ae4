/**
 * Comparison of weights, and PEFT's golden pairs through pack and runtime. Uses nothing of Node, so that a browser can
 * run it. Strings name files as the platform does: paths, or URLs.
 */
import { type BackendOptions, createRuntime, openPack, type SourceInput, type View } from "eigenlora";
import { decodeTensor, openSafetensors, openSource, uniform } from "./internals/base.ts";
import { openHost } from "./internals/runtime.ts";
import type { SuiteTest } from "./stand-in.ts";

/** Tensors of a safetensors file as f32, by name. */
export async function tensorsOf(path: string): Promise<Map<string, { shape: readonly number[]; data: Float32Array }>> {
  const source = await openSource(path);
  const file = await openSafetensors(source);
  const tensors = new Map<string, { shape: readonly number[]; data: Float32Array }>();
  for (const [name, { shape }] of file.tensors) tensors.set(name, { shape, data: await file.readF32(name) });
  await source.close?.();
  return tensors;
}

/** Largest absolute difference; infinite where lengths differ or a number is not finite. */
export function difference(found: ArrayLike<number>, expected: ArrayLike<number>): number {
  if (found.length !== expected.length) return Infinity;
  let largest = 0;
  for (let i = 0; i < expected.length; i++) {
    const off = Math.abs(found[i]! - expected[i]!);
    if (!(off <= largest)) largest = Number.isNaN(off) ? Infinity : off;
  }
  return largest;
}

/** Largest absolute difference divided by the largest absolute value of `expected`. */
export function relativeDifference(found: ArrayLike<number>, expected: ArrayLike<number>): number {
  let largest = 0;
  for (let i = 0; i < expected.length; i++) largest = Math.max(largest, Math.abs(expected[i]!));
  return difference(found, expected) / (largest || 1);
}

/** ΔW [out, in] of factors. */
export function deltaOf(
  { rank, A, Bt }: { readonly rank: number; readonly A: ArrayLike<number>; readonly Bt: ArrayLike<number> },
  out: number = Bt.length / rank,
  inputs: number = A.length / rank,
): Float64Array {
  const delta = new Float64Array(out * inputs);
  for (let k = 0; k < rank; k++)
    for (let o = 0; o < out; o++)
      for (let i = 0; i < inputs; i++) delta[o * inputs + i]! += Bt[k * out + o]! * A[k * inputs + i]!;
  return delta;
}

/** Uniform in [-1, 1), seeded. */
export function noise(count: number, seed: number): Float64Array {
  const random = uniform(seed);
  return Float64Array.from({ length: count }, () => 2 * random() - 1);
}

export function floats(view: View): Float32Array {
  const bytes = bytesOf(view);
  const count = view.shape.reduce((a, b) => a * b, 1);
  const padded = new Uint8Array(Math.ceil(bytes.length / 4) * 4);
  padded.set(bytes);
  return decodeTensor(view.dtype, padded, 1, count);
}

export function bytesOf(view: View): Uint8Array {
  return (view.data as Uint8Array).slice(view.byteOffset);
}

/** A base and an adapter, and PEFT's merge of them. */
export interface Golden {
  name: string;
  /** Holds base.safetensors and merged.safetensors. */
  folder: string;
  /** Lossless pack of this adapter alone. */
  pack: SourceInput;
  task: string;
  /** Weights that PEFT's merge changes. */
  changed: readonly string[];
  /** Allowed difference, relative to the largest value of a weight. Default: 1e-6. */
  tolerance?: number;
}

/** Folds the golden's task into its base, which changes exactly what it should, and takes it out again. */
export async function checkGolden(t: SuiteTest, golden: Golden, options: BackendOptions): Promise<void> {
  const { name, folder, pack, task, changed, tolerance = 1e-6 } = golden;
  const base = `${folder}/base.safetensors`;
  const runtime = await createRuntime(await openPack(pack), { ...options, base });
  const source = await openSource(`${folder}/merged.safetensors`);
  const merged = await openSafetensors(source);
  await runtime.switchTask(task);
  t.strictSame([...runtime.changes().keys()].sort(), [...changed].sort(), `${name}, ${runtime.backend}: what changes`);
  for (const weight of changed) {
    const difference = relativeDifference(floats(await runtime.readWeight(weight)), await merged.readF32(weight));
    t.ok(difference <= tolerance, `${name}, ${runtime.backend}, ${weight}: off by ${difference}`);
  }
  await runtime.switchTask(null);
  const pristine = await openHost(base);
  for (const weight of changed) {
    const [now, before] = [bytesOf(await runtime.readWeight(weight)), bytesOf(await pristine.read(weight))];
    const same = now.length === before.length && now.every((byte, i) => byte === before[i]);
    t.ok(same, `${name}, ${runtime.backend}, ${weight}: the base's bits at null`);
  }
  await pristine.close?.();
  await source.close?.();
  await runtime.close();
}
