/**
 * The components of a pack inside a model: products with them, in the smallest form that a runtime multiplies by. Integers enter the
 * graph without the scales of their rows: a core between the components brings these.
 */
import { FLOAT, INT8, UINT8 } from "./linear.ts";
import { type Added, CONTRIBUTED, type Place, PREFIX } from "./nodes.ts";

/** The components of one side of a module, [rows, width]. */
export interface ComponentRows {
  readonly rows: number;
  readonly width: number;
  /** f32, row-major. */
  floats(): Float32Array;
  /** Where the pack stores integers: component = scale of its row · integer. */
  readonly integers?: StoredIntegers | undefined;
}

export interface StoredIntegers {
  readonly bits: 3 | 4 | 8;
  /** [rows]. */
  readonly scales: Float32Array;
  /** Row-major. */
  values(): Int8Array;
}

/** Components of one module. */
export interface Components {
  readonly A: ComponentRows;
  readonly B: ComponentRows;
}

/**
 * Operators by which a runtime multiplies floats by integers: MatMulNBits where it has a fast one for 4 bits, and DequantizeLinear of a
 * byte each in front of a product.
 */
export type IntegerProducts = readonly ("MatMulNBits" | "DequantizeLinear")[];

/** What enters the graph. */
type Form = "floats" | "bytes" | "nibbles";

/** Adds products with components to a graph. */
export class ComponentProducts {
  readonly #by: IntegerProducts;
  readonly #added: Added[];
  readonly #shared = new Set<string>();
  /** Whether one of onnxruntime's own operators was used. */
  contributed = false;

  /** @param by none: of floats alone */
  constructor(by: IntegerProducts, added: Added[]) {
    this.#by = by;
    this.#added = added;
  }

  /** Which form these components take; those of different forms do not enter one product. */
  formOf({ integers }: ComponentRows): Form {
    if (integers && integers.bits <= 4 && this.#by.includes("MatMulNBits")) return "nibbles";
    return integers && this.#by.includes("DequantizeLinear") ? "bytes" : "floats";
  }

  /** What the core has to multiply the row of each component with; undefined: nothing. */
  scalesOf(rows: ComponentRows): Float32Array | undefined {
    return this.formOf(rows) === "floats" ? undefined : rows.integers!.scales;
  }

  /**
   * x [.., width] · Eᵀ, of all sides one below the other: [.., Σ rows].
   * @param sides of one form and width
   */
  project(place: Place, x: string, sides: readonly ComponentRows[], name: string): string {
    const width = sides[0]!.width;
    const count = sides.reduce((sum, { rows }) => sum + rows, 0);
    return this.#product(place, x, name, width, count, this.formOf(sides[0]!), (values) => {
      const joined = new (values(sides[0]!).constructor as Float32ArrayConstructor)(count * width);
      let at = 0;
      for (const side of sides) {
        joined.set(values(side) as Float32Array, at);
        at += side.rows * width;
      }
      return { values: joined, inner: 1, outer: width };
    });
  }

  /** x [.., rows] · E: [.., width]. */
  expand(place: Place, x: string, side: ComponentRows, name: string): string {
    return this.#product(place, x, name, side.rows, side.width, this.formOf(side), (values) => {
      return { values: values(side), inner: side.width, outer: 1 };
    });
  }

  /**
   * x [.., inner] · M, with M[i, o] = values[i · strides.inner + o · strides.outer].
   * @param matrix asks for the values of sides in the form
   */
  #product(
    place: Place,
    x: string,
    name: string,
    inner: number,
    outer: number,
    form: Form,
    matrix: (values: (side: ComponentRows) => Float32Array | Int8Array) => Matrix,
  ): string {
    const isNew = !this.#shared.has(name);
    this.#shared.add(name);
    if (form === "floats") {
      if (isNew)
        this.#add(
          name,
          FLOAT,
          [inner, outer],
          turned(
            matrix((side) => side.floats()),
            inner,
            outer,
          ),
        );
      return place.op("MatMul", [x, name]);
    }
    const integers = (): Matrix => matrix((side) => side.integers!.values());
    if (form === "bytes") {
      if (isNew) this.#add(name, INT8, [inner, outer], turned(integers(), inner, outer));
      return place.op("MatMul", [x, place.op("DequantizeLinear", [name, this.#ones(1, [])])]);
    }
    const block = blockOf(inner);
    const blocks = Math.ceil(inner / block);
    if (isNew) this.#add(name, UINT8, [outer, blocks, block / 2], nibbles(integers(), inner, outer, blocks * block));
    this.contributed = true;
    const attributes = { K: inner, N: outer, bits: 4, block_size: block, accuracy_level: F32 };
    return place.op("MatMulNBits", [x, name, this.#ones(outer * blocks)], attributes, CONTRIBUTED);
  }

  /** Scales of blocks, which all products of one shape share. */
  #ones(count: number, dims: readonly number[] = [count]): string {
    const name = `${PREFIX}/ones/${dims.join()}`;
    if (!this.#shared.has(name)) {
      this.#shared.add(name);
      this.#add(name, FLOAT, dims, new Float32Array(count).fill(1));
    }
    return name;
  }

  #add(name: string, type: number, dims: readonly number[], data: Added["data"]): void {
    this.#added.push({ name, type, dims, data });
  }
}

/** `accuracy_level` of MatMulNBits: floats are not rounded to integers first. */
const F32 = 1;

/** Values with the distance of neighbours along either side of the matrix that they are. */
interface Matrix {
  readonly values: Float32Array | Int8Array;
  readonly inner: number;
  readonly outer: number;
}

/** [inner, outer], row-major. */
function turned<T extends Float32Array | Int8Array>(matrix: Matrix, inner: number, outer: number): T {
  const { values } = matrix;
  if (matrix.outer === 1) return values as T;
  const out = new (values.constructor as Float32ArrayConstructor)(inner * outer);
  for (let i = 0; i < inner; i++) {
    for (let o = 0; o < outer; o++) out[i * outer + o] = values[i * matrix.inner + o * matrix.outer]!;
  }
  return out as unknown as T;
}

/** The block that wastes least, its f32 scale counted. Of those the largest. */
function blockOf(inner: number): number {
  const bytes = (block: number): number => Math.ceil(inner / block) * (block / 2 + 4);
  return [256, 128, 64, 32, 16].reduce((best, block) => (bytes(block) < bytes(best) ? block : best));
}

/** [outer, inner] as MatMulNBits has it: two values a byte, the first one low, 8 more than they are; rows padded with zeros. */
function nibbles(matrix: Matrix, inner: number, outer: number, padded: number): Uint8Array {
  const out = new Uint8Array((outer * padded) / 2).fill(0x88);
  const { values } = matrix;
  for (let o = 0; o < outer; o++) {
    for (let i = 0; i < inner; i++) {
      const value = values[i * matrix.inner + o * matrix.outer]! + 8;
      const at = (o * padded + i) >> 1;
      out[at] = i % 2 === 0 ? (out[at]! & 0xf0) | value : (out[at]! & 0x0f) | (value << 4);
    }
  }
  return out;
}
