/** Writes `.onnx_adapter` files. Readers do without it. */
import { IDENTIFIER } from "./onnx-adapter.ts";

/** A parameter of f32 to write. */
export interface OnnxAdapterEntry {
  readonly name: string;
  readonly shape: readonly number[];
  /** Little-endian f32. */
  readonly bytes: Uint8Array;
}

const FLOAT = 1;
/** FlatBuffers have signed offsets of 32 bits. */
const MOST_BYTES = 2 ** 31 - 1;
/** Both tables have four fields of 4 bytes: bytes of the list of their places, and of a table with the way to that list. */
const [VTABLE, TABLE] = [12, 20];

const align = (at: number, to: number, rest = 0): number => at + ((((rest - at) % to) + to) % to);

/** Where everything lies: names and dimensions of the parameters, and their values. */
function layOut(entries: readonly OnnxAdapterEntry[], names: readonly Uint8Array[], start: number) {
  let at = start;
  // Elements of 8 bytes and values begin at a multiple of 8, behind a length of 4 bytes.
  const places = entries.map(({ shape }, i) => {
    const name = at;
    const dims = align(name + 4 + names[i]!.length + 1, 8, 4);
    at = align(dims + 4 + 8 * shape.length, 4);
    return { name, dims };
  });
  const values = entries.map(({ bytes }) => {
    const place = align(at, 8, 4);
    at = place + 4 + bytes.length;
    return place;
  });
  if (at > MOST_BYTES) throw new RangeError(`writeOnnxAdapter: ${at} bytes, ${MOST_BYTES} at most fit into the format`);
  return { places, values, end: at };
}

/**
 * The bytes of an adapter of ONNX Runtime, chunk by chunk: tables and names, then each parameter's values.
 * @throws RangeError when they take 2 GiB or more
 */
export async function* writeOnnxAdapter(entries: readonly OnnxAdapterEntry[]): AsyncGenerator<Uint8Array, void> {
  const names = entries.map(({ name }) => new TextEncoder().encode(name));
  // Header, list of fields and table of the root; list of parameters; list of fields and tables of the parameters.
  const list = 8 + VTABLE + TABLE;
  const vtable = list + 4 + 4 * entries.length;
  const first = vtable + VTABLE;
  const { places, values, end } = layOut(entries, names, first + TABLE * entries.length);

  const head = new Uint8Array(values[0] ?? end);
  const view = new DataView(head.buffer);
  const u32 = (place: number, value: number): void => view.setUint32(place, value, true);
  const fields = (place: number): void => {
    for (const [i, value] of [VTABLE, TABLE, 4, 8, 12, 16].entries()) view.setUint16(place + 2 * i, value, true);
  };
  /** An offset is counted from where it stands. */
  const point = (place: number, to: number): void => u32(place, to - place);
  const root = 8 + VTABLE;
  point(0, root);
  for (let i = 0; i < 4; i++) head[4 + i] = IDENTIFIER.charCodeAt(i);
  fields(8);
  u32(root, VTABLE);
  for (const place of [4, 8, 12]) u32(root + place, 1);
  point(root + 16, list);
  u32(list, entries.length);
  fields(vtable);
  for (const [i, { shape }] of entries.entries()) {
    const table = first + TABLE * i;
    const { name, dims } = places[i]!;
    point(list + 4 + 4 * i, table);
    u32(table, table - vtable);
    point(table + 4, name);
    point(table + 8, dims);
    u32(table + 12, FLOAT);
    point(table + 16, values[i]!);
    u32(name, names[i]!.length);
    head.set(names[i]!, name + 4);
    u32(dims, shape.length);
    for (const [d, size] of shape.entries()) view.setBigUint64(dims + 4 + 8 * d, BigInt(size), true);
  }
  yield head;
  for (const [i, { bytes }] of entries.entries()) {
    const length = new Uint8Array(4);
    new DataView(length.buffer).setUint32(0, bytes.length, true);
    yield length;
    yield bytes;
    const next = values[i + 1];
    if (next !== undefined) yield new Uint8Array(next - (values[i]! + 4 + bytes.length));
  }
}
