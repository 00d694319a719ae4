/**
 * Adds products with a pack's components to a model, in the smallest form that a runtime multiplies by. Integers enter the graph without
 * the scales of their rows: the core between the components contains these.
 */
import { FLOAT, INT8, type Linear, UINT8 } from "./linear.ts";
import { attribute } from "./model.ts";
import { type Added, CONTRIBUTED, type Place, PREFIX } from "./nodes.ts";
import type { NodeProto } from "./protobuf.ts";

/** The components of one side of a module, [rows, width]. */
export interface ComponentRows {
  readonly rows: number;
  readonly width: number;
  /** Values as f32, row-major. */
  floats(): Float32Array;
  /** Integers, where the pack stores them: component = scale of its row · integer. */
  readonly integers?: StoredIntegers | undefined;
}

export interface StoredIntegers {
  readonly bits: 3 | 4 | 8;
  /** Scales [rows]. */
  readonly scales: Float32Array;
  /** Integers, row-major. */
  values(): Int8Array;
}

/** Components of one module. */
export interface Components {
  readonly A: ComponentRows;
  readonly B: ComponentRows;
}

/**
 * Operators that a runtime has for products of floats and integers: MatMulNBits where 4 bits are fast, DequantizeLinear of bytes in front
 * of a product, and both where MatMulNBits takes bytes too.
 */
export type IntegerProducts = readonly ("MatMulNBits" | "DequantizeLinear")[];

/** Form in which components enter the graph. */
type Form = "floats" | "bytes" | "nibbles";

/** Adds products with components to a graph. */
export class ComponentProducts {
  readonly #by: IntegerProducts;
  readonly #added: Added[];
  readonly #level: number;
  readonly #shared = new Set<string>();
  /** Whether an operator of onnxruntime's own domain was used. */
  contributed = false;

  /**
   * @param by operators for integers; none: floats only
   * @param layers that terms are added to: where the model has all of their inputs rounded to 8 bits, products with 4 bits do the same
   */
  constructor(
    by: IntegerProducts,
    added: Added[],
    layers: readonly { readonly linears: readonly Pick<Linear, "node" | "product">[] }[],
  ) {
    this.#by = by;
    this.#added = added;
    const levelOf = (node: NodeProto): number => Number(attribute(node, "accuracy_level")?.i ?? 0);
    const levels = layers.flatMap(({ linears }) => linears.map(({ node, product = node }) => levelOf(product)));
    this.#level = levels.length > 0 && levels.every((level) => level === EIGHT_BITS) ? EIGHT_BITS : F32;
  }

  /** Form that these components take. Components of different forms do not share a product. */
  formOf({ integers }: ComponentRows): Form {
    if (integers && integers.bits <= 4 && this.#by.includes("MatMulNBits")) return "nibbles";
    return integers && this.#by.includes("DequantizeLinear") ? "bytes" : "floats";
  }

  /** Factors that the core has to apply to the row of each component; undefined: none. */
  scalesOf(rows: ComponentRows): Float32Array | undefined {
    return this.formOf(rows) === "floats" ? undefined : rows.integers!.scales;
  }

  /** What an input has to know of components that its rows are coefficients over. */
  under(
    rows: ComponentRows | undefined,
  ): { readonly K: number; readonly scales: Float32Array | undefined } | undefined {
    return rows && { K: rows.rows, scales: this.scalesOf(rows) };
  }

  /**
   * Product x [.., width] · Eᵀ with all sides one below the other: [.., Σ rows].
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

  /** Product x [.., rows] · E: [.., width]. */
  expand(place: Place, x: string, side: ComponentRows, name: string): string {
    return this.#product(place, x, name, side.rows, side.width, this.formOf(side), (values) => {
      return { values: values(side), inner: side.width, outer: 1 };
    });
  }

  /**
   * Product x [.., inner] · M, with M[i, o] = values[i · strides.inner + o · strides.outer].
   * @param matrix returns the values of the sides in the form
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
    // Rounded inputs share a scale within a block: small ones keep what is rounded as exact as in the model's own layers.
    const block = this.#level === EIGHT_BITS ? 32 : blockOf(inner);
    const blocks = Math.ceil(inner / block);
    if (form === "bytes" && !this.#multipliesBytes(inner, blocks * block)) {
      if (isNew) this.#add(name, INT8, [inner, outer], turned(integers(), inner, outer));
      return place.op("MatMul", [x, place.op("DequantizeLinear", [name, this.#ones(1, [])])]);
    }
    const bits = form === "bytes" ? 8 : 4;
    const pack = form === "bytes" ? padded : nibbles;
    if (isNew)
      this.#add(name, UINT8, [outer, blocks, (block * bits) / 8], pack(integers(), inner, outer, blocks * block));
    this.contributed = true;
    const attributes = { K: inner, N: outer, bits, block_size: block, accuracy_level: this.#level };
    return place.op("MatMulNBits", [x, name, this.#ones(outer * blocks)], attributes, CONTRIBUTED);
  }

  /**
   * Whether a product with bytes is one operator, instead of unpacking them in each run. It rounds its inputs to 8 bits, so the model's
   * layers must do so too; and few components must not grow much when they are padded to a block.
   */
  #multipliesBytes(inner: number, padded: number): boolean {
    return this.#level === EIGHT_BITS && this.#by.includes("MatMulNBits") && 2 * padded <= 3 * inner;
  }

  /** Scales of blocks, all 1; products of one shape share them. */
  #ones(count: number, dims: readonly number[] = [count]): string {
    const name = `${PREFIX}/scales/${dims.join()}`;
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

/** `accuracy_level` of MatMulNBits: inputs are not rounded to integers first, or to 8 bits, which takes a third of the time. */
const F32 = 1;
const EIGHT_BITS = 4;

/** Values with their strides along both dimensions of a matrix. */
interface Matrix {
  readonly values: Float32Array | Int8Array;
  readonly inner: number;
  readonly outer: number;
}

/** Copies a matrix to [inner, outer], row-major. */
function turned<T extends Float32Array | Int8Array>(matrix: Matrix, inner: number, outer: number): T {
  const { values } = matrix;
  if (matrix.outer === 1) return values as T;
  const out = new (values.constructor as Float32ArrayConstructor)(inner * outer);
  for (let i = 0; i < inner; i++) {
    for (let o = 0; o < outer; o++) out[i * outer + o] = values[i * matrix.inner + o * matrix.outer]!;
  }
  return out as unknown as T;
}

/** Block size that wastes least, its f32 scale included; the largest of equals. */
function blockOf(inner: number): number {
  const bytes = (block: number): number => Math.ceil(inner / block) * (block / 2 + 4);
  return [256, 128, 64, 32, 16].reduce((best, block) => (bytes(block) < bytes(best) ? block : best));
}

/** Bytes [outer, inner] as MatMulNBits needs them: each with 128 added; rows are padded with zeros. */
function padded({ values, ...strides }: Matrix, inner: number, outer: number, width: number): Uint8Array {
  const out = new Uint8Array(outer * width).fill(128);
  for (let o = 0; o < outer; o++)
    for (let i = 0; i < inner; i++) out[o * width + i] = values[o * strides.outer + i * strides.inner]! + 128;
  return out;
}

/** Packs [outer, inner] as MatMulNBits needs it: two values a byte, the first one low, each with 8 added; rows are padded with zeros. */
function nibbles({ values, ...strides }: Matrix, inner: number, outer: number, padded: number): Uint8Array {
  const out = new Uint8Array((outer * padded) / 2).fill(0x88);
  for (let o = 0; o < outer; o++) {
    for (
      let i = 0, from = o * strides.outer, at = (o * padded) >> 1;
      i < inner;
      i += 2, from += 2 * strides.inner, at++
    ) {
      const high = i + 1 < inner ? values[from + strides.inner]! : 0;
      out[at] = (values[from]! + 8) | ((high + 8) << 4);
    }
  }
  return out;
}
