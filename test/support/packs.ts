/** Shared by the tests: the repository's real data, and packs made of it. */
import { readdir, readFile } from "node:fs/promises";
import { fileURLToPath } from "node:url";
import { openPack, type Pack, type Runtime, type TensorRef, type Term } from "eigenlora";
import { type Adapter, type BuildOptions, type BuildReport, buildPack, taskAdapter } from "eigenlora/build";
import { readAdapters } from "eigenlora/node";
import { deltaOf, type Golden, relativeDifference } from "./compare.ts";
import { decodeTensor } from "./internals/base.ts";
import { type layoutAppend, placeOf, type Sign, streamFresh, type TaskToWrite } from "./internals/format.ts";
import { allOf, deltaError, relative } from "./internals/pack.ts";

/** Options that store everything an adapter has without loss. */
export const LOSSLESS = {
  select: { kind: "energy", share: 1 },
  dtype: { basis: "f32", coefficients: "f32", head: "f32" },
} as const;

/** Absolute path of a file under test/data. */
export function data(path: string): string {
  return fileURLToPath(new URL(`../data/${path}`, import.meta.url));
}

/** Absolute path of a file under test/vectors/valid, whose packs and task files are written from SPEC.md alone. */
export function vector(name: string): string {
  return fileURLToPath(new URL(`../vectors/valid/${name}`, import.meta.url));
}

export function concat(chunks: readonly Uint8Array[]): Uint8Array<ArrayBuffer> {
  return new Uint8Array(Buffer.concat(chunks));
}

/** The chunks of a fresh pack whose blobs are in memory. */
export async function freshChunks(
  { tasks, ...basis }: Parameters<typeof streamFresh>[0] & { readonly tasks: readonly TaskToWrite[] },
  sign?: Sign,
): Promise<Uint8Array[]> {
  return allOf((await streamFresh(basis, await Promise.all(tasks.map(placeOf)), sign)).chunks);
}

/** A pack with the written bytes of an append. */
export function applied(
  bytes: Uint8Array,
  { body, superblock, superblockOffset, offset }: Awaited<ReturnType<typeof layoutAppend>>,
): Uint8Array<ArrayBuffer> {
  const grown = concat([bytes.subarray(0, offset), ...body]);
  grown.set(superblock, superblockOffset);
  return grown;
}

/** A pack of adapters, open. */
export async function packed(adapters: readonly Adapter[], options: BuildOptions = LOSSLESS): Promise<Pack> {
  return openPack(concat((await buildPack(adapters, options)).chunks));
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

/** PEFT's golden pairs that load, each with a lossless pack of its adapter in memory. */
export async function goldenPacks(options: BuildOptions = {}): Promise<(Golden & { pack: Uint8Array<ArrayBuffer> })[]> {
  const goldens: (Golden & { pack: Uint8Array<ArrayBuffer> })[] = [];
  for (const name of await readdir(data("goldens/peft"))) {
    const folder = data(`goldens/peft/${name}`);
    const { expect, changed } = JSON.parse(await readFile(`${folder}/case.json`, "utf8"));
    if (expect === "refuse") continue;
    const [adapter] = await readAdapters([`${folder}/adapter`]);
    const base = `${folder}/base.safetensors`;
    const { chunks } = await buildPack([adapter!], { ...LOSSLESS, ...options, base });
    goldens.push({ name, folder, pack: concat(chunks), task: adapter!.id, changed });
    await adapter!.close();
  }
  return goldens;
}

/**
 * Distance of two packs of the same tasks: bases as stored, components and means; and coefficients, relative to the
 * largest of their side. Infinite where shapes differ.
 */
export async function packDifference(found: Pack, expected: Pack): Promise<{ bases: number; coefficients: number }> {
  const off = { bases: 0, coefficients: 0 };
  const values = (bytes: Uint8Array, { dtype: type, rows, width, byteOffset, byteLength }: TensorRef): Float32Array =>
    decodeTensor(type, bytes.subarray(byteOffset, byteOffset + byteLength), rows, width);
  const [bases, expectedBases] = [(await found.bases()).bytes, (await expected.bases()).bytes];
  for (const [i, module] of expected.modules.entries()) {
    for (const side of ["A", "B"] as const) {
      const [a, b] = [
        values(bases, found.modules[i]![side][0]!.tensor),
        values(expectedBases, module[side][0]!.tensor),
      ];
      const same = a.length === b.length && found.modules[i]!.name === module.name;
      off.bases = Math.max(
        off.bases,
        same ? a.reduce((largest, value, k) => Math.max(largest, Math.abs(value - b[k]!)), 0) : Infinity,
      );
    }
  }
  for (const id of expected.tasks.keys()) {
    const [a, b] = [await found.load(id), await expected.load(id)];
    for (const [i, term] of b.terms.entries()) {
      for (const side of ["A", "B"] as const) {
        const difference = relativeDifference(
          values(a.bytes, a.terms[i]![side]!.tensor),
          values(b.bytes, term[side]!.tensor),
        );
        off.coefficients = Math.max(off.coefficients, difference);
      }
    }
  }
  return off;
}

/** ‖ΔW − ΔW'‖ / ‖ΔW‖ of a task as its pack's reader decodes it: of all modules together, and of each. */
export async function lossOf(pack: Pack, { id, modules }: Adapter): Promise<{ total: number; each: number[] }> {
  const task = await taskAdapter(pack, id);
  const pair = ({ rank, A, Bt }: Term) => ({ rank, A: Float64Array.from(A), Bt: Float64Array.from(Bt) });
  let [lost, all] = [0, 0];
  const each: number[] = [];
  for (const [name, module] of modules) {
    const found = await task.modules.get(name)?.read();
    const none = { rank: 1, A: new Float32Array(module.in), Bt: new Float32Array(module.out) };
    const { difference, norm } = deltaError(pair(await module.read()), pair(found ?? none));
    each.push(relative(difference, norm));
    lost += difference ** 2;
    all += norm ** 2;
  }
  await task.close();
  return { total: relative(Math.sqrt(lost), Math.sqrt(all)), each };
}

/** ΔW of a term: Btᵀ·A, and the components on both sides of the core. */
export async function termDelta(
  term: NonNullable<ReturnType<Runtime["term"]>>,
  pack: Pack,
  name: string,
): Promise<Float64Array> {
  const module = pack.modules.find((m) => m.name === name)!;
  const out = deltaOf(term, module.out, module.in);
  if (!term.core) return out;
  const bases = (await pack.bases()).bytes;
  const rows = (side: "A" | "B"): Float32Array => {
    const { dtype, rows: n, width, byteOffset, byteLength } = module[side][0]!.tensor;
    return decodeTensor(dtype, bases.subarray(byteOffset, byteOffset + byteLength), n, width);
  };
  const [EA, EB, core] = [rows("A"), rows("B"), term.core];
  const [ka, kb] = [module.A[0]!.tensor.rows, module.B[0]!.tensor.rows];
  for (let a = 0; a < ka; a++) {
    for (let b = 0; b < kb; b++) {
      const s = core[a * kb + b]!;
      for (let o = 0; o < module.out; o++) {
        const x = s * EB[b * module.out + o]!;
        for (let i = 0; i < module.in; i++) out[o * module.in + i]! += x * EA[a * module.in + i]!;
      }
    }
  }
  return out;
}
