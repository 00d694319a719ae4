/**
 * A file of named tensors, whatever its format: names, dtypes and shapes known, values on demand; and JSON of such files.
 */
import type { ReadOptions } from "../source.ts";

/** Facts about a tensor before it is read. */
export interface TensorInfo {
  /** "F32", "BF16", "I64", …; in GGUF also "Q8_0" and others. */
  readonly dtype: string;
  /** Row-major: the last dimension is the one whose elements lie side by side. */
  readonly shape: readonly number[];
}

/** Tensors by name, each read on demand. */
export interface TensorFile {
  /** Name of the source, for messages. */
  readonly name: string;
  /** Size of the whole file. */
  readonly byteLength: number;
  readonly tensors: ReadonlyMap<string, TensorInfo>;
  /**
   * A tensor's values as f32, row-major. F16, BF16 and Q8_0 are exact, F64 is rounded.
   * @throws FormatError when there is no such tensor or its dtype is none of these and F32; SourceError when the bytes cannot be had
   */
  readF32(name: string, options?: ReadOptions): Promise<Float32Array<ArrayBuffer>>;
}

/** True if `readF32` decodes this dtype. */
export function isFloatDtype(dtype: string): boolean {
  return dtype === "F32" || dtype === "F16" || dtype === "BF16" || dtype === "F64" || dtype === "Q8_0";
}

/** No file that is read here needs more; code that walks what was read may be recursive. */
const MAX_DEPTH = 64;

/**
 * The value of a JSON text.
 * @throws SyntaxError for what is not JSON, is nested deeper than 64 levels, or has an object that names a key twice: `JSON.parse` keeps
 *   the last
 */
export function parseJson(text: string): unknown {
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (cause) {
    throw new SyntaxError(`is not valid JSON: ${(cause as Error).message}`, { cause });
  }
  checkKeys(text);
  return value;
}

/** @param text valid JSON */
function checkKeys(text: string): void {
  /** Keys of the objects around a place, undefined for arrays. */
  const around: (Set<string> | undefined)[] = [];
  let string = "";
  let escaped = false;
  for (let at = 0; at < text.length; at++) {
    switch (text[at]) {
      case '"': {
        const start = at++;
        escaped = false;
        for (; text[at] !== '"'; at++) {
          if (text[at] !== "\\") continue;
          escaped = true;
          at++;
        }
        string = text.slice(start, at + 1);
        break;
      }
      case ":": {
        const keys = around[around.length - 1]!;
        const key = escaped ? (JSON.parse(string) as string) : string.slice(1, -1);
        if (keys.has(key)) throw new SyntaxError(`names ${show(key)} twice`);
        keys.add(key);
        break;
      }
      case "{":
      case "[":
        around.push(text[at] === "{" ? new Set() : undefined);
        if (around.length > MAX_DEPTH) throw new SyntaxError(`is nested deeper than ${MAX_DEPTH} levels`);
        break;
      case "}":
      case "]":
        around.pop();
    }
  }
}

/** A value of JSON for a message, cut short: a file can hold anything. */
export function show(value: unknown): string {
  let text: string;
  try {
    text = JSON.stringify(value) ?? "missing";
  } catch {
    // A caller may parse by other means: too deep for the stack, or no JSON at all.
    return typeof value;
  }
  return text.length > 80 ? `${text.slice(0, 80)}…` : text;
}

/** A tensor that is made of others: another shape, and values of its own. */
export interface Derived extends TensorInfo {
  read(options?: ReadOptions): Promise<Float32Array<ArrayBuffer>>;
}

/** The file with some of its tensors replaced. */
export function withDerived<T extends TensorFile>(file: T, derived: ReadonlyMap<string, Derived>): T {
  if (derived.size === 0) return file;
  return {
    ...file,
    tensors: new Map([...file.tensors, ...derived]),
    readF32: (name: string, options?: ReadOptions) => derived.get(name)?.read(options) ?? file.readF32(name, options),
  };
}

/** The tensor [a, b] as [b, a]. */
export function transposed(file: TensorFile, name: string): Derived {
  const { dtype, shape } = file.tensors.get(name)!;
  const [rows = 0, columns = 0] = shape;
  return {
    dtype,
    shape: [columns, rows],
    read: async (options) => transpose(await file.readF32(name, options), rows, columns),
  };
}

/** [rows, columns] → [columns, rows]. */
export function transpose<T extends Float32Array | Int8Array>(values: T, rows: number, columns: number): T {
  const turned = values.slice() as T;
  for (let r = 0; r < rows; r++) for (let c = 0; c < columns; c++) turned[c * rows + r] = values[r * columns + c]!;
  return turned;
}
