/**
 * The way back from a pack: a task as a canonical adapter, from coefficients to factors, in plain JS with f64 sums; and
 * the components as a safetensors file. Reads every kind of term. For export, verification and tests; the runtime has
 * kernels of its own.
 */

import { type Adapter, type AdapterModule, f32Bytes, type SavedTensor } from "../adapters/adapter.ts";
import { tilesOf } from "../backends/backend.ts";
import type { Pack } from "../core/pack.ts";
import { checkExpansion } from "../core/terms.ts";
import { checkOptions, checkPack } from "../errors.ts";
import {
  type Coefficients,
  encodedTensor,
  type PackModule,
  readTensor,
  type Side,
  type TaskBlob,
  type TaskTerm,
  type TensorRef,
} from "../format/format.ts";
import { atOnce, paced, pacer } from "../pace.ts";
import type { AbortOptions } from "../source.ts";
import { decodePart } from "../tensor/dtypes.ts";
import type { SafetensorsEntry } from "../tensor/safetensors.ts";
import type { Term } from "../tensor/term.ts";
import { storedDtypes } from "./add.ts";

/** Numbers of a piece of work: some milliseconds. */
const PIECE = 2 ** 19;

/** Expands one term of a task: its rank counts shared and private rows. */
export function expandTerm(blob: TaskBlob, term: TaskTerm, module: PackModule, bases: Uint8Array): Term {
  return atOnce(expanding(blob, term, module, bases));
}

/** The same, yielding between pieces of work. */
function* expanding(blob: TaskBlob, term: TaskTerm, module: PackModule, bases: Uint8Array): Generator<void, Term> {
  const rank = term.rank + term.privateRank;
  function* side(
    coefficients: Coefficients | undefined,
    sides: readonly Side[],
    own: TensorRef | undefined,
    privateRows: TensorRef | undefined,
    width: number,
  ): Generator<void, Float32Array> {
    const out = new Float32Array(rank * width);
    if (own) yield* reading(blob.bytes, own, out);
    if (coefficients) yield* expandSide(blob, coefficients, sides[coefficients.basis]!, bases, out);
    if (privateRows) yield* reading(blob.bytes, privateRows, out.subarray(term.rank * width));
    return out;
  }
  return {
    rank,
    A: yield* side(term.A, module.A, term.ownA, term.privateA, module.in),
    Bt: yield* side(term.B, module.B, term.ownBt, term.privateBt, module.out),
    magnitude: term.magnitude && readTensor(blob.bytes, term.magnitude),
  };
}

/** Reads a tensor, yielding between pieces of work. */
function* reading(section: Uint8Array, ref: TensorRef, out: Float32Array): Generator<void, Float32Array> {
  for (const part of tilesOf(ref.rows, ref.width, 0, PIECE)) {
    decodePart(ref.dtype, encodedTensor(section, ref), ref.rows, ref.width, part, out);
    yield;
  }
  return out;
}

/** Adds rows to those in `out`, in 64 bits. */
function* expandSide(
  blob: TaskBlob,
  { mean, tensor }: Coefficients,
  { K, tensor: basis }: Side,
  bases: Uint8Array,
  out: Float32Array,
): Generator<void> {
  const { width } = basis;
  const components = yield* reading(bases, basis, new Float32Array(basis.rows * width));
  const alpha = yield* reading(blob.bytes, tensor, new Float32Array(tensor.rows * K));
  const sums = new Float64Array(width);
  for (const [first, rows, column, columns] of tilesOf(tensor.rows, width, K, PIECE)) {
    for (let row = first; row < first + rows; row++) {
      for (let i = 0; i < columns; i++) sums[i] = mean ? components[K * width + column + i]! : 0;
      for (let k = 0; k < K; k++) {
        const a = alpha[row * K + k]!;
        for (let i = 0, at = k * width + column; i < columns; i++) sums[i]! += a * components[at + i]!;
      }
      for (let i = 0, at = row * width + column; i < columns; i++) out[at + i]! += sums[i]!;
    }
    yield;
  }
}

/**
 * A task of a pack as an adapter, as the readers of adapter files give them. Holds the pack's bases until it is closed.
 * Reading a module has pauses, in which `signal` is heard.
 * @throws TaskError when there is no such task, or its factors would become more than the pack was opened for;
 *   SourceError, FormatError when it cannot be read
 */
export async function taskAdapter(pack: Pack, id: string, options: AbortOptions = {}): Promise<Adapter> {
  checkPack("taskAdapter", pack);
  checkOptions("taskAdapter", options, ["signal"]);
  // Before anything is awaited: the task may be removed or replaced meanwhile.
  const info = pack.tasks.get(id);
  const blob = await pack.load(id, options);
  checkExpansion(pack, id, blob, "factors");
  const bases = await pack.bases(options);
  const pause = pacer(options.signal);
  const modules = new Map<string, AdapterModule>();
  for (const term of blob.terms) {
    const module = pack.modules[term.module]!;
    const { name, out, in: inputs, layout, kernel } = module;
    // Adapter files have no LoRA without rows, which a magnitude alone would be.
    const rank = Math.max(1, term.rank + term.privateRank);
    const zeros = { rank: 1, A: new Float32Array(inputs), Bt: new Float32Array(out) };
    modules.set(name, {
      name,
      out,
      in: inputs,
      rank,
      layout,
      kernel,
      read: async () => {
        const { magnitude, ...pair } = await paced(expanding(blob, term, module, bases.bytes), pause);
        return { ...(pair.rank > 0 ? pair : zeros), ...(magnitude && { magnitude }) };
      },
    });
  }
  const saved = blob.parameters.map(
    ({ name, role, shape, indices, tensor }): SavedTensor => ({
      name,
      role,
      shape,
      indices,
      read: async () => readTensor(blob.bytes, tensor),
    }),
  );
  return {
    id,
    file: pack.name,
    byteLength: info?.adapterBytes ?? 0,
    baseModel: pack.directory.basis.baseModel,
    modules,
    saved,
    metadata: info?.metadata ?? {},
    warnings: [],
    close: async () => bases.close(),
  };
}

// The components of a pack for those who train elsewhere: a LoRA whose rows are coefficients over these components
// loses nothing when it is added.

/** The key in the file's metadata by which it is known; its value is the basis id of the pack. */
const COMPONENTS = "eigenlora.components";

/** Components of a pack, to be written by `writeSafetensors`. */
interface ComponentsFile {
  /**
   * `MODULE.A.components` [K, in] and `MODULE.B.components` [K, out], f32 as the pack decodes them, [K, rank, width] of
   * a flat pack; with a mean also `MODULE.A.mean`, without the first dimension. Rows of B are those of Bᵀ, scale
   * included.
   */
  readonly tensors: readonly SafetensorsEntry[];
  /**
   * Strings: `base_model`, `coefficients` (their number format), `gauge`, `modules` (JSON, names of all that can be
   * adapted), and `rank`, the most that a task keeps, where the pack limits it.
   */
  readonly metadata: Map<string, string>;
  /**
   * Modules that can be adapted, and factors of theirs that have components of all tasks; rows of the others are free.
   */
  readonly modules: number;
  readonly sides: number;
  /** Releases the pack's bases, after the tensors are written. */
  close(): void;
}

/**
 * Reads the components that all tasks of a pack share, one tensor at a time. Embeddings are left out: PEFT holds their
 * factors apart.
 * @throws SourceError, FormatError when the pack cannot be read
 */
export async function componentsFile(pack: Pack): Promise<ComponentsFile> {
  checkPack("componentsFile", pack);
  const modules = pack.modules.filter(({ layout }) => layout !== "embedding");
  const sides = modules.flatMap((module) => [sideOf(module, "A"), sideOf(module, "B")]);
  const { coefficients } = await storedDtypes(pack);
  const { baseModel, gauge, rank } = pack.directory.basis;
  const { bytes, close } = await pack.bases();
  return {
    tensors: sides.flatMap(({ name, basis }) => (basis ? tensorsOf(name, basis, bytes) : [])),
    metadata: new Map([
      ["format", "pt"],
      [COMPONENTS, pack.basisId],
      ...(baseModel === undefined ? [] : [["base_model", baseModel] as const]),
      ["coefficients", coefficients],
      ...(rank === undefined ? [] : [["rank", `${rank}`] as const]),
      ["gauge", gauge],
      ["modules", JSON.stringify(modules.map(({ name }) => name))],
    ]),
    modules: modules.length,
    sides: sides.filter(({ basis }) => basis).length,
    close,
  };
}

/** A side that tasks share in groups is free: coefficients would have to choose one. */
function sideOf({ name, ...module }: PackModule, side: "A" | "B"): { name: string; basis: Side | undefined } {
  const [basis, ...others] = module[side];
  return { name: `${name}.${side}`, basis: basis && basis.K > 0 && others.length === 0 ? basis : undefined };
}

function tensorsOf(name: string, { K, rank, mean, tensor }: Side, bases: Uint8Array): SafetensorsEntry[] {
  const { width } = tensor;
  const row = rank === undefined ? [width] : [rank, width / rank];
  const read = (from: number, to: number) => (): Uint8Array =>
    f32Bytes(readTensor(bases, tensor).subarray(from * width, to * width));
  const entry = (part: string, shape: number[], read: () => Uint8Array): SafetensorsEntry => {
    return { name: `${name}.${part}`, dtype: "F32", shape, read };
  };
  const components = entry("components", [K, ...row], read(0, K));
  return mean ? [components, entry("mean", row, read(K, K + 1))] : [components];
}
