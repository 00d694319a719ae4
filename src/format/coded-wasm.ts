/**
 * Coded sections decoded by WebAssembly (`assembly/coded.ts`), where there is some: several times as fast as
 * `coded.ts`, most with the first section. And decoded integers as floats, six times as fast as `placeTensor`.
 *
 * A module of its own instead of a part of the backend's kernels: sections are decoded where there is no backend, and
 * those kernels are loaded without it in the core of every app. Where an engine has no WebAssembly, no SIMD or a policy
 * against it, `coded.ts` decodes. The module is compiled synchronously. Pages in older Chromium refuse that above 4 kB,
 * so `coded.ts` decodes there.
 */
import binary from "#wasm/coded";
import { DTYPES, type QuantizedDtype } from "../tensor/dtypes.ts";

/** A coded section that is to be decoded. */
export interface CodedWork {
  /** The section, with a head that was checked. */
  readonly stored: Uint8Array;
  /** Bytes that copies may repeat, in addition to the section itself. */
  readonly before: Uint8Array;
  /** Bytes that it becomes. */
  readonly size: number;
  /** First tables, levels of means, and levels of given frequencies. */
  readonly tables: readonly [Int32Array, Uint8Array, Uint8Array];
  /** Throws for a fault, by its number in `assembly/coded.ts`, at a byte of the section. */
  refuse(fault: number, at: number): never;
}

interface WasmDecoder {
  readonly memory: WebAssembly.Memory;
  readonly begin: (stored: number, before: number, size: number) => void;
  readonly decode: (symbols: number) => number;
  readonly floats: (type: number, rows: number, width: number, to: number) => void;
  readonly turn: (rows: number, width: number, from: number, to: number) => void;
  readonly fault: WebAssembly.Global<"i32">;
  readonly place: WebAssembly.Global<"i32">;
}

/** Addresses, as `assembly/coded.ts` has them. */
const TABLES = [0, 5632, 5904];
const STORED = 143_392;

const PAGE = 65_536;
/** Memory that is kept for the next section or tensor; that of larger ones is given back. */
const MOST_KEPT = 32 * PAGE;
/**
 * All bytes of a section, coded and not, and what it copies from. More than this is for an engine without such limits.
 */
const MOST = 1 << 28;
/** Symbols of a piece: less than a millisecond once the code is hot. */
const PIECE = 1 << 14;

/** Bytes that are taken over in one piece: a millisecond or two. */
const COPIED = 1 << 22;

let module: WebAssembly.Module | undefined;
const kept: WasmDecoder[] = [];
let refused = typeof WebAssembly === "undefined";

/** Decodes by WebAssembly, in pieces; undefined where there is none, or too little memory. */
export function wasmWork(work: CodedWork): Generator<void, Uint8Array<ArrayBuffer>> | undefined {
  const { stored, before, size } = work;
  const decoder = withMemory(STORED + stored.length + before.length + size, take() ?? another());
  return decoder && decoded(decoder, work);
}

function* decoded(
  decoder: WasmDecoder,
  { stored, before, size, tables, refuse }: CodedWork,
): Generator<void, Uint8Array<ArrayBuffer>> {
  const { memory, begin, decode, fault, place } = decoder;
  const start = STORED + stored.length + before.length;
  const bytes = new Uint8Array(memory.buffer);
  for (const [i, { buffer, byteOffset, byteLength }] of tables.entries())
    bytes.set(new Uint8Array(buffer, byteOffset, byteLength), TABLES[i]);
  bytes.set(stored, STORED);
  bytes.set(before, start - before.length);
  // Memory beyond what is kept is new, and zero.
  bytes.fill(0, start, Math.min(start + size, MOST_KEPT));
  try {
    begin(stored.length, before.length, size);
    while (decode(PIECE) === 0) yield;
  } catch (error) {
    if (fault.value > 0) refuse(fault.value, place.value);
    throw new RangeError(`no memory is left to decode ${size} bytes`, { cause: error });
  }
  const section = new Uint8Array(size);
  for (let at = 0; at < size; at += COPIED) {
    yield;
    // Decoding may have moved the memory.
    section.set(new Uint8Array(memory.buffer, start + at, Math.min(COPIED, size - at)), at);
  }
  keep(decoder);
  return section;
}

/**
 * The numbers of an encoded tensor, as `decodeTensor` gives them, valid until anything else is decoded. Undefined where
 * the engine does not compile the module, or has too little memory.
 * @param turned whether [width, rows] is wanted
 */
export function wasmFloats(
  dtype: QuantizedDtype,
  bytes: Uint8Array,
  rows: number,
  width: number,
  turned: boolean,
): Float32Array | undefined {
  const size = 4 * rows * width;
  const start = Math.ceil((STORED + bytes.length) / 16) * 16;
  const decoder = withMemory(start + (turned ? 2 : 1) * size, take() ?? another());
  if (!decoder) return undefined;
  const { memory, floats, turn } = decoder;
  new Uint8Array(memory.buffer).set(bytes, STORED);
  floats(DTYPES.indexOf(dtype), rows, width, start);
  if (turned) turn(rows, width, start, start + size);
  keep(decoder);
  return new Float32Array(memory.buffer, turned ? start + size : start, rows * width);
}

/** A decoder that nobody else has until it is kept: two sections may be decoded in turns. */
function take(): WasmDecoder | undefined {
  return kept.pop();
}

function keep(decoder: WasmDecoder): void {
  if (decoder.memory.buffer.byteLength <= MOST_KEPT) kept.push(decoder);
}

/** The decoder with that many bytes of memory. */
function withMemory(bytes: number, decoder: WasmDecoder | undefined): WasmDecoder | undefined {
  if (!decoder) return undefined;
  if (bytes > MOST) {
    keep(decoder);
    return undefined;
  }
  const pages = Math.ceil((bytes - decoder.memory.buffer.byteLength) / PAGE);
  try {
    if (pages > 0) decoder.memory.grow(pages);
    return decoder;
  } catch {
    return undefined;
  }
}

/**
 * Makes one more decoder, without a promise as in src/backends/wasm.ts.
 * @returns undefined where the engine refuses, or memory lacks
 */
function another(): WasmDecoder | undefined {
  if (refused) return undefined;
  try {
    module ??= new WebAssembly.Module(binary);
  } catch {
    refused = true;
    return undefined;
  }
  try {
    const memory = new WebAssembly.Memory({ initial: 3 });
    return { memory, ...new WebAssembly.Instance(module, { env: { memory } }).exports } as unknown as WasmDecoder;
  } catch {
    // There may be memory for one later.
    return undefined;
  }
}
