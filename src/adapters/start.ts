/**
 * Adapters whose training began from a changed base. PiSSA and OLoRA take B₀·A₀ out of a weight and train the factors
 * from there; PEFT computes B₀·A₀ again whenever it loads the adapter. Relative to the base as it was, ΔW = s·(B·A −
 * B₀·A₀), which is what PEFT's own conversion stores.
 */

import { type CpuView, type Located, viewValues, type WeightHost } from "../core/base.ts";
import { WeightResolver } from "../core/mismatch.ts";
import { AdapterError } from "../errors.ts";
import { principalComponents } from "../extract/components.ts";
import { lq, norm, type Products, ROUNDING } from "../extract/linalg.ts";
import { fastProducts } from "../extract/wasm-products.ts";
import type { Term } from "../tensor/term.ts";
import type { ModuleShape } from "./adapter.ts";

/** Starts that follow from the base's weight alone. */
export type BaseStart = "pissa" | "olora";

/**
 * Factors that a start takes out of a weight: A [rank, in], Bt [rank, out]. OLoRA's are to be multiplied with the
 * adapter's scale.
 */
type Factors = Record<"A" | "Bt", Float64Array>;

/** Starts by base, since many adapters of one base have the same: by name, rank and kind. */
const known = new WeakMap<WeightHost, Map<string, Promise<Factors>>>();

/**
 * Adds to a term what its start took out of the base's weight.
 * @param scale of the adapter for this module
 * @param file of the adapter, for messages
 * @throws BaseMismatchError when the base does not have the module; AdapterError where the base does not determine the
 *   start
 */
export async function fromBase(
  start: BaseStart,
  module: ModuleShape,
  term: Term,
  scale: number,
  host: WeightHost,
  file: string,
): Promise<Term> {
  const { name, in: inputs } = module;
  const starts = known.get(host) ?? new Map<string, Promise<Factors>>();
  known.set(host, starts);
  const key = `${start} ${term.rank} ${name}`;
  if (!starts.has(key)) starts.set(key, factorsOf(start, module, term.rank, host, file));
  const { A, Bt } = await starts.get(key)!;
  // PiSSA divides its singular values by the scale.
  const factor = start === "pissa" ? -1 : -scale;
  return {
    ...term,
    rank: term.rank + A.length / inputs,
    A: joined(term.A, A),
    Bt: joined(
      term.Bt,
      Bt.map((value) => factor * value),
    ),
  };
}

function joined(first: Float32Array, second: Float64Array): Float32Array {
  const both = new Float32Array(first.length + second.length);
  both.set(first);
  both.set(second, first.length);
  return both;
}

async function factorsOf(
  start: BaseStart,
  module: ModuleShape,
  rank: number,
  host: WeightHost,
  file: string,
): Promise<Factors> {
  const resolver = new WeightResolver(host);
  const { name: weight, transposed } = inBase(resolver, module);
  const [rows, columns] = transposed ? [module.in, module.out] : [module.out, module.in];
  const stored = Float64Array.from(viewValues((await host.read(weight)) as CpuView));
  const products = await fastProducts();
  // The weight keeps the order it is stored in: a singular value decomposition is the same either way, and PEFT's OLoRA
  // does not turn a weight.
  const found = (start === "pissa" ? strongest : firstColumns)(stored, rows, columns, rank, products);
  if (found) return transposed ? { A: found.Bt, Bt: found.A } : found;
  throw new AdapterError(
    `init_lora_weights is "${start}": ${weight} of the base does not determine the start of rank ${rank} of ${module.name} beyond ` +
      "the rounding of f32; convert the adapter in PEFT, where it was trained",
    { file, field: "init_lora_weights" },
  );
}

/** The best approximation of W [rows, columns] of a rank; undefined where the next singular value is the same. */
function strongest(
  w: Float64Array,
  rows: number,
  columns: number,
  rank: number,
  products: Products,
): Factors | undefined {
  const most = Math.min(rows, columns);
  const kept = Math.min(rank, most);
  const asked = Math.min(kept + 1, most);
  const floors = new Float64Array(rows);
  const { count, vectors, singular } = principalComponents(w, rows, columns, floors, asked, products);
  const gap = kept < most ? singular[kept - 1]! - singular[kept]! : Infinity;
  if (count < kept || gap <= ROUNDING * singular[0]!) return undefined;
  const A = vectors.slice(0, kept * columns);
  return { A, Bt: products.multiplyTransposed(A, w, kept, rows, columns) };
}

/**
 * Q·R of W [rows, columns] up to a rank: W projected onto its first columns; undefined where these depend on each
 * other.
 */
function firstColumns(
  w: Float64Array,
  rows: number,
  columns: number,
  rank: number,
  products: Products,
): Factors | undefined {
  const kept = Math.min(rank, rows, columns);
  const first = Float64Array.from({ length: kept * rows }, (_, i) => w[(i % rows) * columns + Math.floor(i / rows)]!);
  const lengths = Array.from({ length: kept }, (_, k) => norm(first, k * rows, rows));
  const { L, Q } = lq(first, kept, rows);
  if (lengths.some((length, k) => Math.abs(L[k * kept + k]!) <= ROUNDING * length)) return undefined;
  return { A: products.multiply(Q, w, kept, columns, rows), Bt: Q };
}

/** A module's weight in a base whose names nothing maps. @throws BaseMismatchError where it is not there */
export function inBase(resolver: WeightResolver, module: ModuleShape): Located {
  try {
    return resolver.locate(module);
  } catch (error) {
    const { message } = error as Error;
    (error as Error).message = message.replace(
      "map them with the option `names`",
      "let the base list them by the module's",
    );
    throw error;
  }
}
