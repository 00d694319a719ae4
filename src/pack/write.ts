/**
 * Writing packs: fresh ones of a new basis or of the basis of an open pack, appends, signatures; with the entropy
 * coding of what is stored (SPEC.md, appendix A), where it takes fewer bytes.
 */
import type { Pack } from "../core/pack.ts";
import { parseTaskFile } from "../core/read-task-file.ts";
import { ALGORITHM, importKey, publicKeyBytes, signedMessage } from "../core/trust.ts";
import { checkPack, described, TrustError } from "../errors.ts";
import type { Extractor } from "../extract/extractor.ts";
import { isCoded } from "../format/coded.ts";
import { basesTensors, parseBasis, parseTask, taskTensors } from "../format/directory.ts";
import {
  type Append,
  type BasisInput,
  encodeBasis,
  encodeSignedTaskFile,
  layoutAppend,
  layoutSigned,
  placeOf,
  type Sign,
  streamFresh,
  type TaskPlace,
  type TaskToWrite,
} from "../format/encode.ts";
import { encodeSection } from "../format/encode-coded.ts";
import { decode, sha256 } from "../format/fields.ts";
import { type PackModule, type TensorRef, VERSION } from "../format/format.ts";
import { atOnce } from "../pace.ts";
import { fromBase64, toHex } from "../text.ts";

/** Where blobs lie until their pack is written, for who has no memory for all of them. */
export interface Scratch {
  /** @returns what reads them again, once */
  put(bytes: Uint8Array): Promise<() => Promise<Uint8Array>>;
}

interface Making {
  /** Codes tasks while the next ones are made. Default: they are coded here. */
  readonly extractor?: Extractor | undefined;
  /** Takes blobs. Default: they are in memory. */
  readonly scratch?: Scratch | undefined;
}

/**
 * A pack as consecutive chunks, asked for once, its bytes and those of its blobs. Its sections are coded where it has a
 * step.
 */
export async function newPack(
  basis: Omit<BasisInput, "producer" | "header">,
  tasks: readonly (() => Promise<TaskToWrite>)[],
  { extractor, scratch }: Making = {},
): Promise<{ bytes: number; chunks: AsyncIterable<Uint8Array>; blobs: number[] }> {
  const coding = basis.step !== undefined;
  let first = coding && tasks.length > 1 ? await tasks[0]!() : undefined;
  const header = first && headerOf(first);
  const { description, bases, both } = encodeBasis({ producer: `eigenlora ${VERSION}`, ...basis, header });
  const basisId = toHex(await sha256(both));
  const parsed =
    coding && atOnce(parseBasis(description, { coded: false, length: bases.length }, "the new pack")).basis;
  const coder = parsed && { modules: parsed.modules, description };
  const coded = coder ? codedBases(bases, coder) : undefined;
  let turn: Promise<unknown> = Promise.resolve();
  const placed = async (make: () => Promise<TaskToWrite>): Promise<TaskPlace> => {
    // One after the other, since each needs much memory.
    const made = turn.then(make);
    turn = made.catch(() => {});
    const task = await made;
    if (!coder) return placeOf(task);
    if (!extractor) return placeOf(codedTask(task, coder));
    // The blob is given away.
    const options = { tensors: tensorsOf(task, coder.modules), before: description };
    return placeOf({ entry: task.entry, blob: await extractor.ask("code", task.blob, options) });
  };
  const again = async (): Promise<TaskToWrite> => {
    const task = first!;
    first = undefined;
    return task;
  };
  const makes = first ? [again, ...tasks.slice(1)] : tasks;
  const places: TaskPlace[] = [];
  for await (const place of inOrder(makes, Math.min(2, extractor?.size ?? 1), placed)) {
    places.push(scratch ? { ...place, read: await scratch.put(await place.read()) } : place);
  }
  const { bytes, chunks } = await streamFresh({ description, bases, coded, basisId }, places);
  return { bytes, chunks, blobs: places.map(({ length }) => length) };
}

/**
 * Works on items in their order, a few ahead of what was taken, so that reading and several threads go on meanwhile.
 * @param ahead so many items are under way at most
 */
export async function* inOrder<T, R>(
  items: readonly T[],
  ahead: number,
  work: (item: T) => Promise<R>,
): AsyncGenerator<R, void> {
  const under: Promise<R>[] = [];
  let next = 0;
  try {
    while (next < items.length || under.length > 0) {
      while (next < items.length && under.length < ahead) {
        const result = work(items[next++]!);
        // Its turn to fail comes later, or never where another fails first.
        result.catch(() => {});
        under.push(result);
      }
      yield await under.shift()!;
    }
  } finally {
    await Promise.allSettled(under);
  }
}

/** All chunks, in memory. */
export async function allOf(chunks: Iterable<Uint8Array> | AsyncIterable<Uint8Array>): Promise<Uint8Array[]> {
  const all: Uint8Array[] = [];
  for await (const chunk of chunks) all.push(chunk);
  return all;
}

/**
 * The tasks of an open pack, those added and without those removed, as they are to be written elsewhere: byte for byte,
 * so that each keeps its hash (SPEC.md, section 8).
 * @param replaced other blobs, by id
 */
export async function tasksOf(pack: Pack, replaced: ReadonlyMap<string, Uint8Array> = new Map()): Promise<TaskPlace[]> {
  const places: TaskPlace[] = [];
  for (const { id, adapterBytes, metadata, brings } of pack.tasks.values()) {
    const read = async (): Promise<Uint8Array> => replaced.get(id) ?? pack.stored(id);
    const entry = { id, adapterBytes, metadata, brings };
    places.push({ ...(await placeOf({ entry, blob: await read() })), read });
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
  const places = tasks ?? (await tasksOf(pack));
  const bases = await pack.bases();
  const { basisBytes: description, bases: section } = pack.directory;
  const coded = section.coded ? codedBases(bases.bytes, { modules: pack.modules, description }) : undefined;
  const basis = { description, bases: bases.bytes, coded, basisId: pack.basisId };
  const { bytes, chunks } = await streamFresh(basis, places, sign).catch((error: unknown) => {
    bases.close();
    throw error;
  });
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
 * Plans the bytes that add tasks to a pack's file (SPEC.md, section 9). Their ids must be new and unique; their blobs
 * are written as they are.
 * @param sign made by `createSigner`. Default: not signed
 */
export async function planAppend(pack: Pack, tasks: readonly TaskToWrite[], sign?: Sign): Promise<Append> {
  checkPack("planAppend", pack);
  if (sign) refuseBare(pack);
  return layoutAppend(pack, tasks, sign);
}

/** A longer header, as one with numbers of rows, is a task's own. In bytes. */
const MOST_HEADER = 16_384;

/** The basis that sections are coded for. */
interface Basis {
  readonly modules: readonly PackModule[];
  /** Its bytes as stored. */
  readonly description: Uint8Array;
}

/** The bases as they are stored; undefined where coding saves nothing. */
export function codedBases(bases: Uint8Array, { modules, description }: Basis): Uint8Array | undefined {
  return encodeSection(bases, refsOf(basesTensors(modules)), 16, description);
}

/** A task whose blob is coded, where that takes fewer bytes. */
export function codedTask(task: TaskToWrite, { modules, description }: Basis): TaskToWrite {
  const { entry, blob } = task;
  const coded = encodeSection(blob, tensorsOf(task, modules), 4, description);
  return { entry, blob: coded ?? blob };
}

function tensorsOf({ entry, blob }: TaskToWrite, modules: readonly PackModule[]): TensorRef[] {
  const { terms, parameters } = atOnce(parseTask(blob, modules, entry.id, entry));
  return refsOf(taskTensors(terms, parameters, modules));
}

/**
 * The header of a task's blob, for the others to copy from the basis description; undefined where it is too long for
 * that.
 */
function headerOf({ blob }: TaskToWrite): unknown {
  const length = new DataView(blob.buffer, blob.byteOffset).getUint32(4, true);
  return length > MOST_HEADER
    ? undefined
    : atOnce(decode(blob.subarray(8, 8 + length), "the new pack", "task", "header")).plain();
}

/** True where a pack's sections are coded; added ones will be, too. */
export function isCodedPack({ directory }: Pick<Pack, "directory">): boolean {
  return directory.sections.some(({ coded }) => coded);
}

/** A task as the pack stores it: coded where the pack is. */
export function storedTask(pack: Pick<Pack, "directory" | "modules">, task: TaskToWrite): TaskToWrite {
  if (!isCodedPack(pack) || isCoded(task.blob)) return task;
  return codedTask(task, { modules: pack.modules, description: pack.directory.basisBytes });
}

function refsOf(tensors: Iterable<readonly [string, TensorRef | undefined, ...unknown[]]>): TensorRef[] {
  return [...tensors].flatMap(([, tensor]) => tensor ?? []);
}

/** Plans the bytes that sign a pack's file: a superblock, nothing else. @param sign made by `createSigner` */
export async function planSignature(pack: Pack, sign: Sign): Promise<Append> {
  checkPack("planSignature", pack);
  refuseBare(pack);
  return layoutSigned(pack, sign);
}

/** @throws TrustError for a pack whose root says nothing of its sections */
function refuseBare({ directory, name }: Pack): void {
  if (directory.bases.integrity !== undefined) return;
  const message =
    "it has no hashes, so a signature would say nothing of its tasks: write it anew with `eigenlora compact`";
  throw new TrustError(message, { file: name });
}

/**
 * A task file, signed; in the place of a signature that it may have.
 * @param sign made by `createSigner`
 * @throws FormatError when it is no task file, or damaged
 */
export async function signTaskFile(file: Uint8Array, sign: Sign): Promise<Uint8Array<ArrayBuffer>> {
  const { content } = parseTaskFile(file, "the task file");
  return encodeSignedTaskFile({ content, signature: await sign("task", await sha256(content)) });
}

// Ed25519 keys to sign with, by the platform's WebCrypto (SPEC.md, section 8). Signatures are checked in
// `core/trust.ts`.

/** An Ed25519 key to sign with: PEM (PKCS#8), or a pair of `CryptoKey`s. */
export type SigningKey = string | CryptoKeyPair;

/**
 * Makes a signer from a key: pass it to `planSignature`, `planAppend`, `freshPack` and `signTaskFile`.
 * @throws TypeError when it is no such key; TrustError where the platform has no Ed25519
 * @example
 * import { readFile } from "node:fs/promises";
 * const sign = await createSigner(await readFile("key.pem", "utf8"));
 */
export async function createSigner(key: SigningKey): Promise<Sign> {
  const { privateKey, publicKey } = typeof key === "string" ? await pairOf(key) : { ...key };
  if (privateKey?.algorithm?.name !== ALGORITHM) {
    throw new TypeError(`createSigner: expected an Ed25519 key pair or PEM, got ${described(key)}`);
  }
  const name = publicKey instanceof Uint8Array ? publicKey : await publicKeyBytes(publicKey, "publicKey");
  return async (kind, hash) => {
    const signature = await crypto.subtle.sign(ALGORITHM, privateKey, signedMessage(kind, hash));
    return { key: name, bytes: new Uint8Array(signature) };
  };
}

async function pairOf(pem: string): Promise<{ privateKey: CryptoKey; publicKey: Uint8Array }> {
  const body = /-----BEGIN PRIVATE KEY-----([A-Za-z0-9+/=\s]+)-----END PRIVATE KEY-----/.exec(pem)?.[1];
  if (body === undefined) {
    throw new TypeError("the key to sign with: expected PEM, -----BEGIN PRIVATE KEY----- (eigenlora keygen makes one)");
  }
  const der = fromBase64(body.replace(/\s/g, ""));
  const privateKey = await importKey("the key to sign with", () =>
    crypto.subtle.importKey("pkcs8", der, ALGORITHM, true, ["sign"]),
  );
  const { x } = await crypto.subtle.exportKey("jwk", privateKey);
  return { privateKey, publicKey: fromBase64(x!.replaceAll("-", "+").replaceAll("_", "/")) };
}
