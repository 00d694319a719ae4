/** Shared by the tests: the repository's real data, and packs made of it. */
import { readFile } from "node:fs/promises";
import { fileURLToPath } from "node:url";
import { readAdapters } from "../dist/src/adapters/folder.js";
import { buildPack, type BuildOptions, type BuildReport } from "../dist/src/pack/build.js";
import { openSafetensors } from "../dist/src/safetensors.js";
import { openSource } from "../dist/src/source.js";

/** Absolute path of something under test/data. */
export function data(path: string): string {
  return fileURLToPath(new URL(`data/${path}`, import.meta.url));
}

export function concat(chunks: readonly Uint8Array[]): Uint8Array<ArrayBuffer> {
  return new Uint8Array(Buffer.concat(chunks));
}

/** A pack of some adapters of a suite, or of some of their modules, in memory. */
export async function packOf(
  paths: readonly string[],
  options: BuildOptions = {},
  only: (module: string) => boolean = () => true,
): Promise<{ bytes: Uint8Array<ArrayBuffer>; report: BuildReport }> {
  const adapters = await readAdapters(paths.map(data));
  const some = adapters.map((a) => ({ ...a, modules: new Map([...a.modules].filter(([name]) => only(name))) }));
  const { chunks, report } = await buildPack(some, options);
  for (const adapter of adapters) await adapter.close();
  return { bytes: concat(chunks), report };
}

/** Tensors of a safetensors file as f32, by name. */
export async function tensorsOf(path: string): Promise<Map<string, { shape: readonly number[]; values: Float32Array }>> {
  const file = await openSafetensors(await openSource(await readFile(path)));
  const tensors = new Map<string, { shape: readonly number[]; values: Float32Array }>();
  for (const [name, { shape }] of file.tensors) tensors.set(name, { shape, values: await file.readF32(name) });
  return tensors;
}

/** Largest absolute difference divided by the largest absolute value of `expected`. */
export function relativeDifference(found: ArrayLike<number>, expected: ArrayLike<number>): number {
  let difference = 0;
  let largest = 0;
  for (let i = 0; i < expected.length; i++) {
    difference = Math.max(difference, Math.abs(found[i]! - expected[i]!));
    largest = Math.max(largest, Math.abs(expected[i]!));
    if (Number.isNaN(found[i])) return Infinity;
  }
  return found.length === expected.length ? difference / (largest || 1) : Infinity;
}
