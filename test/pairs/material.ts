/** Material of objects: an MLP, two adapters for it and two more; bytes, stores and engines with late answers. */
import { type ByteSource, type OpenOptions, openPack, type Pack, SourceError } from "eigenlora";
import { type Adapter, buildPack, encodeTaskFile } from "eigenlora/build";
import type { RangeStore } from "eigenlora/cache";
import { readAdapters } from "eigenlora/node";
import { createEngine } from "eigenlora/onnxruntime";
import type { Engine } from "eigenlora/session";
import { concat, data, LOSSLESS } from "../packs.ts";
import { NODE } from "../sessions.ts";
import { late, must } from "./harness.ts";

export const ADAPTERS = (await readAdapters([data("sessions/adapters-mlp")])) as [Adapter, Adapter];
function like({ modules, saved, ...rest }: Adapter, id: string, scale: number): Adapter {
  const scaled = (values: Float32Array): Float32Array => values.map((value) => scale * value);
  const changed = [...modules].map(([name, { read, ...module }]) => {
    return [name, { ...module, read: () => read().then((term) => ({ ...term, Bt: scaled(term.Bt) })) }] as const;
  });
  return {
    ...{ ...rest, id, modules: new Map(changed) },
    saved: saved.map((one) => ({ ...one, read: () => one.read().then(scaled) })),
  };
}
const base = data("sessions/base-mlp.safetensors");
const all = [...ADAPTERS, like(ADAPTERS[0], "c", 2), like(ADAPTERS[1], "d", 3)];
export const BYTES: Uint8Array = concat((await buildPack(all, { ...LOSSLESS, base })).chunks);

/** A task of a pack as a file. */
export async function fileOf(pack: Pack, id: string, as: string = id): Promise<Uint8Array<ArrayBuffer>> {
  const { metadata, brings } = pack.tasks.get(id)!;
  return encodeTaskFile({ id: as, adapterBytes: 0, metadata, brings }, pack.basisId, (await pack.load(id)).bytes);
}
const whole = await openPack(BYTES);
export const FILES: ReadonlyMap<string, Uint8Array<ArrayBuffer>> = new Map(
  await Promise.all([...whole.tasks.keys()].map(async (id) => [id, await fileOf(whole, id)] as const)),
);
/** Bytes of a task. */
export const BLOB: number = (await whole.load("a")).bytes.length;

/** Bytes that arrive late. */
export function slow(content: Uint8Array, most = 4): ByteSource {
  let open = true;
  return {
    name: "slow",
    byteLength: content.length,
    async read(offset, length, { signal } = {}) {
      if (!open) throw new SourceError("was closed", { file: "slow" });
      await late(most);
      signal?.throwIfAborted();
      return content.slice(offset, offset + length);
    },
    close() {
      open = false;
      return late();
    },
  };
}
export const file = (id: string): ByteSource => slow(FILES.get(id)!);

/** A pack of two tasks, and room for two more. */
export async function packOf(options: OpenOptions = {}): Promise<Pack> {
  const pack = await openPack(slow(BYTES), options);
  for (const id of ["c", "d"]) pack.removeTask(id);
  return pack;
}

/** A slow store. */
export function slowStore(entries: Map<string, Uint8Array>): RangeStore {
  const then = <Result>(work: () => Result): Promise<Result> => late(8).then(work);
  return {
    get: (key) => then(() => entries.get(key)),
    put: (key, bytes) => then(() => void entries.set(key, bytes)),
    delete: (key) => then(() => void entries.delete(key)),
    keys: () => then(() => [...entries.keys()]),
  };
}

/** An engine with late answers, and its number of models. */
export interface Slowly {
  readonly engine: Engine;
  models: number;
}
export function slowly(engine: Engine): Slowly {
  const { name, provider } = engine;
  const counted: Slowly = {
    models: 0,
    engine: {
      ...{ name, provider, tensor: (...of) => engine.tensor(...of) },
      load: (...of) => late().then(() => (counted.models++, engine.load(...of))),
      run: (...of) => late().then(() => engine.run(...of)),
      release: (...of) => (counted.models--, engine.release(...of).then(() => late())),
    },
  };
  return counted;
}
/** Options of a runtime that trains, for the fastest start. */
export const NATIVE = { intraOpNumThreads: 1, graphOptimizationLevel: "disabled" } as const;
export const native = (): Slowly => slowly(createEngine(NODE, NATIVE) as Engine);

/** Checks a pack's counts. @throws when they differ from its content */
export async function checkCounts(pack: Pack): Promise<void> {
  let held = 0;
  for (const { id, resident } of pack.tasks.values()) if (resident) held += (await pack.load(id)).bytes.length;
  const { coefficients } = pack.residentBytes;
  must(coefficients === held, `${coefficients} bytes are said to be resident, not ${held}`);
}
