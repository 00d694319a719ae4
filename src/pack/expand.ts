/**
 * A task of a pack as a canonical adapter: the way back from coefficients to factors, in plain JS with f64 sums. Reads every
 * kind of term. For export, verification and tests; the runtime has kernels of its own.
 */

import type { Adapter, AdapterModule, SavedTensor } from "../adapters/adapter.ts";
import { checkPack } from "../arguments.ts";
import type { Pack } from "../core/pack.ts";
import { checkExpansion } from "../core/selection.ts";
import {
  type Coefficients,
  type PackModule,
  readTensor,
  type Side,
  type TaskBlob,
  type TaskTerm,
  type TensorRef,
} from "../format/format.ts";
import type { Term } from "../tensor/term.ts";

/** Expands one term of a task: its rank counts shared and private rows. */
export function expandTerm(blob: TaskBlob, term: TaskTerm, module: PackModule, bases: Uint8Array): Term {
  const rank = term.rank + term.privateRank;
  const side = (
    coefficients: Coefficients | undefined,
    sides: readonly Side[],
    own: TensorRef | undefined,
    privateRows: TensorRef | undefined,
    width: number,
  ) => {
    const out = new Float32Array(rank * width);
    const added = own && readTensor(blob.bytes, own);
    if (coefficients) out.set(expandSide(blob, coefficients, sides[coefficients.basis]!, bases, added));
    else if (added) out.set(added);
    if (privateRows) out.set(readTensor(blob.bytes, privateRows), term.rank * width);
    return out;
  };
  return {
    rank,
    A: side(term.A, module.A, term.ownA, term.privateA, module.in),
    Bt: side(term.B, module.B, term.ownBt, term.privateBt, module.out),
    magnitude: term.magnitude && readTensor(blob.bytes, term.magnitude),
  };
}

function expandSide(
  blob: TaskBlob,
  { mean, tensor }: Coefficients,
  { K, tensor: basis }: Side,
  bases: Uint8Array,
  own: Float32Array | undefined,
): Float32Array {
  const components = readTensor(bases, basis);
  const alpha = readTensor(blob.bytes, tensor);
  const out = new Float32Array(tensor.rows * basis.width);
  const sums = new Float64Array(basis.width);
  for (let row = 0; row < tensor.rows; row++) {
    for (let i = 0; i < basis.width; i++) sums[i] = mean ? components[K * basis.width + i]! : 0;
    for (let k = 0; k < K; k++) {
      const a = alpha[row * K + k]!;
      for (let i = 0; i < basis.width; i++) sums[i]! += a * components[k * basis.width + i]!;
    }
    if (own) for (let i = 0; i < basis.width; i++) sums[i]! += own[row * basis.width + i]!;
    out.set(sums, row * basis.width);
  }
  return out;
}

/**
 * A task of a pack as an adapter, as the readers of adapter files give them. Holds the pack's bases until it is closed.
 * @throws TaskError when there is no such task, or its factors would become more than the pack was opened for; SourceError, FormatError when
 *   it cannot be read
 */
export async function taskAdapter(pack: Pack, id: string): Promise<Adapter> {
  checkPack("taskAdapter", pack);
  // Before anything is awaited: the task may be removed or replaced meanwhile.
  const info = pack.tasks.get(id);
  const blob = await pack.load(id);
  checkExpansion(pack, id, blob, "factors");
  const bases = await pack.bases();
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
        const { magnitude, ...pair } = expandTerm(blob, term, module, bases.bytes);
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
