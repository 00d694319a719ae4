/**
 * Fresh packs: of a new basis, or of the basis of a pack that is open and other tasks.
 */

import { checkPack } from "../arguments.ts";
import { parseBasis } from "../format/directory.ts";
import { type BasisInput, encodeBasis } from "../format/encode.ts";
import { sha256 } from "../format/hash.ts";
import {
  type Append,
  layoutAppend,
  layoutFresh,
  placeOf,
  type Sign,
  streamFresh,
  type TaskPlace,
  type TaskToWrite,
} from "../format/layout.ts";
import { toHex } from "../tensor/hex.ts";
import { VERSION } from "../version.ts";
import { codedBases, codedTask, commonHeader, storedTask } from "./coding.ts";
import type { Pack } from "./pack.ts";

/** A pack as consecutive chunks, and the bytes of its blobs. Its sections are coded where it has a step. */
export async function newPack(
  basis: Omit<BasisInput, "producer" | "header">,
  tasks: readonly TaskToWrite[],
): Promise<{ chunks: Uint8Array[]; blobs: number[] }> {
  const header = basis.step === undefined ? undefined : commonHeader(tasks.map(({ blob }) => blob));
  const { description, bases } = encodeBasis({ producer: `eigenlora ${VERSION}`, ...basis, header });
  const basisId = toHex(await sha256(description, bases));
  const written = async (stored: readonly TaskToWrite[], coded?: Uint8Array) => ({
    chunks: await layoutFresh({ description, bases, coded, basisId, tasks: stored }),
    blobs: stored.map(({ blob }) => blob.length),
  });
  if (basis.step === undefined) return written(tasks);
  const { modules } = parseBasis(description, { coded: false, length: bases.length }, "the new pack").basis;
  return written(
    tasks.map((task) => codedTask(task, { modules, description })),
    codedBases(bases, { modules, description }),
  );
}

/**
 * The tasks of an open pack, those added and without those removed, as they are to be written elsewhere.
 * @param replaced other blobs, by id
 */
export async function tasksOf(pack: Pack, replaced: ReadonlyMap<string, Uint8Array> = new Map()): Promise<TaskPlace[]> {
  checkPack("tasksOf", pack);
  const places: TaskPlace[] = [];
  for (const { id, adapterBytes, metadata, brings } of pack.tasks.values()) {
    const entry = { id, adapterBytes, metadata, brings };
    const task = async (): Promise<TaskToWrite> =>
      storedTask(pack, { entry, blob: replaced.get(id) ?? (await pack.load(id)).bytes });
    const place = await placeOf(await task());
    // What was coded is small, and coding it again would take as long.
    places.push(place.coded ? place : { ...place, read: async () => (await task()).blob });
  }
  return places;
}

/**
 * A fresh pack on the basis of an open one, which must stay open until the chunks have been written.
 * @param tasks Default: those of the pack
 * @param sign made by `createSigner`. Default: not signed
 */
export async function freshPack(
  pack: Pack,
  tasks?: readonly TaskPlace[],
  sign?: Sign,
): Promise<{ bytes: number; chunks: AsyncGenerator<Uint8Array, void> }> {
  checkPack("freshPack", pack);
  const places = tasks ?? (await tasksOf(pack));
  const bases = await pack.bases();
  const { basisBytes: description, bases: section } = pack.directory;
  const coded = section.coded ? codedBases(bases.bytes, { modules: pack.modules, description }) : undefined;
  const basis = { description, bases: bases.bytes, coded, basisId: pack.basisId };
  const { bytes, chunks } = await streamFresh(basis, places, sign);
  async function* written(): AsyncGenerator<Uint8Array, void> {
    try {
      yield* chunks;
    } finally {
      bases.close();
    }
  }
  return { bytes, chunks: written() };
}

/**
 * What to write to a pack's file so that it has these tasks too (SPEC.md, section 9). Their ids must be new and unique.
 * @param sign made by `createSigner`. Default: not signed
 */
export async function planAppend(pack: Pack, tasks: readonly TaskToWrite[], sign?: Sign): Promise<Append> {
  checkPack("planAppend", pack);
  return layoutAppend(
    pack,
    tasks.map((task) => storedTask(pack, task)),
    sign,
  );
}
