/**
 * Writes the safetensors format, chunk by chunk. Apart from the reader, since a run-time bundle has no use for it.
 */
import { isSize, SAFETENSORS_BITS, tensorByteLength } from "./safetensors.ts";

/** A tensor to write. */
export interface SafetensorsEntry {
  readonly name: string;
  readonly dtype: string;
  readonly shape: readonly number[];
  /** Its bytes, little-endian, row-major. Called once, when the tensor's turn has come. */
  read(): Uint8Array | Promise<Uint8Array>;
}

/**
 * The bytes of a safetensors file, chunk by chunk: the header, then one tensor at a time, so that a file of any size is
 * written with one tensor in memory. Like the reference, wide dtypes come first and the header is padded to 8, so that
 * every tensor is aligned to its element.
 * @throws RangeError when an entry's name is taken or its dtype or shape invalid, or when it reads other than its size
 */
export async function* writeSafetensors(
  entries: readonly SafetensorsEntry[],
  metadata?: ReadonlyMap<string, string>,
): AsyncGenerator<Uint8Array, void> {
  const bitsOf = (entry: SafetensorsEntry): number => SAFETENSORS_BITS.get(entry.dtype) ?? 0;
  const inOrder = [...entries].sort((a, b) => bitsOf(b) - bitsOf(a) || (a.name < b.name ? -1 : 1));
  const names = new Set(["__metadata__"]);
  const lengths: number[] = [];
  const fields = metadata === undefined ? [] : [`"__metadata__":${JSON.stringify(Object.fromEntries(metadata))}`];
  let end = 0;
  for (const entry of inOrder) {
    const { name, dtype, shape } = entry;
    const length = shape.every(isSize) ? tensorByteLength(bitsOf(entry), shape) : undefined;
    if (names.has(name)) throw new RangeError(`writeSafetensors: two tensors or metadata are called ${name}`);
    if (length === undefined || !SAFETENSORS_BITS.has(dtype)) {
      throw new RangeError(`writeSafetensors: ${name} cannot be ${dtype} [${shape.join(", ")}]`);
    }
    names.add(name);
    lengths.push(length);
    fields.push(`${JSON.stringify(name)}:${JSON.stringify({ dtype, shape, data_offsets: [end, end + length] })}`);
    end += length;
  }
  const json = new TextEncoder().encode(`{${fields.join(",")}}`);
  const header = new Uint8Array(8 + 8 * Math.ceil(json.length / 8)).fill(0x20);
  new DataView(header.buffer).setBigUint64(0, BigInt(header.length - 8), true);
  header.set(json, 8);
  yield header;
  for (const [i, entry] of inOrder.entries()) {
    const bytes = await entry.read();
    if (bytes.byteLength !== lengths[i]) {
      throw new RangeError(`writeSafetensors: ${entry.name} takes ${lengths[i]} bytes, got ${bytes.byteLength}`);
    }
    yield bytes;
  }
}
