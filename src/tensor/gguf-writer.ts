/** Writes the GGUF format, version 3. Readers do without it. */

/** A tensor of f32 to write. */
export interface GgufEntry {
  readonly name: string;
  /** Row-major, as everywhere here; GGUF lists dimensions the other way round. */
  readonly shape: readonly number[];
  /** Little-endian f32. */
  readonly bytes: Uint8Array;
}

const ALIGNMENT = 32;
const [UINT32, FLOAT32, STRING] = [4, 6, 8];

/** Little-endian fields, one after another. */
class Fields {
  readonly #parts: Uint8Array[] = [];
  length = 0;

  #put(size: number, write: (view: DataView) => void): void {
    const bytes = new Uint8Array(size);
    write(new DataView(bytes.buffer));
    this.bytes(bytes);
  }

  bytes(bytes: Uint8Array): void {
    this.#parts.push(bytes);
    this.length += bytes.length;
  }

  u32(value: number): void {
    this.#put(4, (view) => view.setUint32(0, value, true));
  }

  u64(value: number): void {
    this.#put(8, (view) => view.setBigUint64(0, BigInt(value), true));
  }

  f32(value: number): void {
    this.#put(4, (view) => view.setFloat32(0, value, true));
  }

  text(value: string): void {
    const bytes = new TextEncoder().encode(value);
    this.u64(bytes.length);
    this.bytes(bytes);
  }

  done(): Uint8Array {
    const all = new Uint8Array(this.length);
    let at = 0;
    for (const part of this.#parts) {
      all.set(part, at);
      at += part.length;
    }
    return all;
  }
}

/**
 * The bytes of a GGUF file, chunk by chunk.
 * @param fields of the header: strings, and numbers, which are written as f32
 */
export async function* writeGguf(
  fields: ReadonlyMap<string, string | number>,
  entries: readonly GgufEntry[],
): AsyncGenerator<Uint8Array, void> {
  const header = new Fields();
  header.bytes(new TextEncoder().encode("GGUF"));
  header.u32(3);
  header.u64(entries.length);
  header.u64(fields.size + 1);
  header.text("general.alignment");
  header.u32(UINT32);
  header.u32(ALIGNMENT);
  for (const [name, value] of fields) {
    header.text(name);
    header.u32(typeof value === "string" ? STRING : FLOAT32);
    if (typeof value === "string") header.text(value);
    else header.f32(value);
  }
  let offset = 0;
  for (const { name, shape, bytes } of entries) {
    header.text(name);
    header.u32(shape.length);
    for (const size of [...shape].reverse()) header.u64(size);
    header.u32(0);
    header.u64(offset);
    offset += bytes.length + padding(bytes.length);
  }
  header.bytes(new Uint8Array(padding(header.length)));
  yield header.done();
  for (const { bytes } of entries) {
    yield bytes;
    if (padding(bytes.length) > 0) yield new Uint8Array(padding(bytes.length));
  }
}

/** Bytes up to the next place where a tensor may begin. */
function padding(length: number): number {
  return (ALIGNMENT - (length % ALIGNMENT)) % ALIGNMENT;
}
