/**
 * A task of a pack as a canonical adapter: the way back from coefficients to factors, in plain JS with f64 sums. Reads every
 * kind of term. For export, verification and tests; the runtime has kernels of its own.
 */

import type { Adapter, AdapterModule, SavedTensor } from "../adapters/adapter.ts";
import { checkOptions, checkPack } from "../arguments.ts";
import { tilesOf } from "../backends/backend.ts";
import type { Pack } from "../core/pack.ts";
import { checkExpansion } from "../core/terms.ts";
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
import type { Term } from "../tensor/term.ts";

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
 * A task of a pack as an adapter, as the readers of adapter files give them. Holds the pack's bases until it is closed. Reading a module has
 * pauses, in which `signal` is heard.
 * @throws TaskError when there is no such task, or its factors would become more than the pack was opened for; SourceError, FormatError when
 *   it cannot be read
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
