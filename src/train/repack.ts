/**
 * Makes a pack whose components were trained for a new task: the same modules with the new components, the factors of every old task
 * solved again, the new task behind them. Whatever old tasks bring beside coefficients stays as it is, byte for byte.
 */

import type { Pack, TaskInfo } from "../core/pack.ts";
import { type ModuleSpace, openModule, projectModule } from "../extract/project.ts";
import type { Subspace } from "../extract/subspace.ts";
import { encodeBasis, encodeTask, type SideInput, type TensorInput, type TermInput } from "../format/encode.ts";
import {
  encodedTensor,
  FINGERPRINT_SIZE,
  type PackModule,
  sharedBases,
  type TaskBlob,
  type TaskTerm,
  type TensorRef,
} from "../format/format.ts";
import { sha256 } from "../format/hash.ts";
import { layoutFresh, type TaskToWrite } from "../format/layout.ts";
import { expandTerm } from "../pack/expand.ts";
import { decodeTensor } from "../tensor/dtypes.ts";
import { encodeTensor } from "../tensor/encode.ts";
import { toHex } from "../text.ts";
import { VERSION } from "../version.ts";
import { storingTrained, type TrainedTerms } from "./trained-terms.ts";

/** A module of the new pack. */
interface NewModule {
  readonly module: PackModule;
  readonly A: SideInput | undefined;
  readonly B: SideInput | undefined;
  /** The new components, where they were trained. */
  readonly space: ModuleSpace | undefined;
  readonly captured: { readonly A: Captured; readonly B: Captured };
}

/**
 * @param parameters of `terms`, components among them
 * @param learned the new task, made with these components
 * @throws RangeError when a component does not fit the number format of the pack
 */
export async function repack(
  pack: Pack,
  terms: TrainedTerms,
  parameters: Float32Array<ArrayBuffer>,
  learned: TaskToWrite,
): Promise<Uint8Array<ArrayBuffer>> {
  // All loads start at once, together with the entries: a task may be removed or replaced while others are read.
  const read = [...pack.tasks.values()].map(async (entry) => ({ entry, blob: await pack.load(entry.id) }));
  const old = await Promise.all(read);
  const bases = await pack.bases();
  try {
    return await repacked(pack, terms, parameters, bases.bytes, old, learned);
  } finally {
    bases.close();
  }
}

async function repacked(
  pack: Pack,
  terms: TrainedTerms,
  parameters: Float32Array<ArrayBuffer>,
  bases: Uint8Array,
  old: readonly { readonly entry: TaskInfo; readonly blob: TaskBlob }[],
  learned: TaskToWrite,
): Promise<Uint8Array<ArrayBuffer>> {
  const places = pack.modules.map((module) => placeOf(module, bases, terms, parameters));
  const tasks: TaskToWrite[] = [];
  for (const { entry, blob } of old) {
    const solved = blob.terms.map((term) => solve(blob, term, places[term.module]!, bases));
    const saved = blob.parameters.map((one) => ({ ...one, ...stored(blob.bytes, one.tensor) }));
    tasks.push({ entry, blob: encodeTask(solved, saved) });
  }
  tasks.push(learned);
  const modules = places.map(({ module, A, B, captured }) => {
    const at = module.fingerprint;
    return {
      ...module,
      A: A && [{ ...A, explained: A.explained * captured.A.share }],
      B: B && [{ ...B, explained: B.explained * captured.B.share }],
      fingerprint: at === undefined ? at : new Float32Array(bases.slice(at, at + 4 * FINGERPRINT_SIZE).buffer),
    };
  });
  const made = encodeBasis({ ...pack.directory.basis, producer: `eigenlora ${VERSION}`, modules });
  const chunks = await layoutFresh({ ...made, basisId: toHex(await sha256(made.description, made.bases)), tasks });
  return new Uint8Array(await new Blob(chunks as BlobPart[]).arrayBuffer());
}

function placeOf(
  module: PackModule,
  bases: Uint8Array,
  terms: TrainedTerms,
  parameters: Float32Array<ArrayBuffer>,
): NewModule {
  const captured = { A: new Captured(), B: new Captured() };
  const trained = (side: "A" | "B"): Float32Array | undefined =>
    terms.part(parameters, module.name, `components${side}`);
  /** Components to store: the trained ones, or the pack's own bytes. */
  const sideOf = (which: "A" | "B"): SideInput | undefined => {
    const basis = sharedBases(module)?.[which];
    if (!basis) return undefined;
    const { rank, tensor, ...side } = basis;
    const { dtype, rows, width } = tensor;
    const values = trained(which);
    return {
      ...side,
      ...(rank === undefined ? {} : { rank }),
      dtype,
      encoded: values
        ? storingTrained(`basis ${which} of "${module.name}"`, () => encodeTensor(dtype, values, rows, width))
        : encodedTensor(bases, tensor),
    };
  };
  const [A, B] = [sideOf("A"), sideOf("B")];
  if (!A || !B || !trained("A")) return { module, A, B, space: undefined, captured };
  const space = openModule({
    A: { ...A, components: A.K, width: module.in },
    B: { ...B, components: B.K, width: module.out },
  });
  return { module, A, B, space, captured };
}

/** Solves a term again: the least squares of its old factors on the new components. */
function solve(blob: TaskBlob, term: TaskTerm, { module, space, captured }: NewModule, bases: Uint8Array): TermInput {
  const { rank, privateRank, A, B, privateA, privateBt, magnitude } = term;
  const bytesOf = (tensor: TensorRef): Uint8Array => encodedTensor(blob.bytes, tensor);
  const beside = {
    ...{ module: term.module, rank },
    ...(privateA &&
      privateBt && {
        privateTerms: { rank: privateRank, dtype: privateA.dtype, A: bytesOf(privateA), Bt: bytesOf(privateBt) },
      }),
    ...(magnitude && { magnitude: stored(blob.bytes, magnitude) }),
  };
  const shared = sharedBases(module);
  if (!A || !B || !shared) return beside;
  const side = (which: "A" | "B", mean: boolean, tensor: TensorInput): NonNullable<TermInput["A"]> => ({
    ...tensor,
    kind: shared[which].kind,
    mean,
  });
  if (!space) {
    const [a, b] = [stored(blob.bytes, A.tensor), stored(blob.bytes, B.tensor)];
    return { ...beside, A: side("A", A.mean, a), B: side("B", B.mean, b) };
  }
  const old = expandTerm(blob, { ...term, privateRank: 0, privateA: undefined, privateBt: undefined }, module, bases);
  const { dtype } = A.tensor;
  const member = { id: "", rank, A: old.A, Bt: old.Bt };
  const { alphaA, alphaB } = projectModule(space, member, { gauge: "as-trained", coefficientDtype: dtype });
  captured.A.add(space.A, old.A, decodeTensor(dtype, alphaA, rank, A.tensor.width));
  captured.B.add(space.B, old.Bt, decodeTensor(dtype, alphaB, rank, B.tensor.width));
  return {
    ...beside,
    A: side("A", shared.A.mean, { dtype, encoded: alphaA }),
    B: side("B", shared.B.mean, { dtype, encoded: alphaB }),
  };
}

function stored(section: Uint8Array, tensor: TensorRef): TensorInput {
  return { dtype: tensor.dtype, encoded: encodedTensor(section, tensor) };
}

/** Share of the tasks' rows, without the mean, that the new components hold. */
class Captured {
  #whole = 0;
  #lost = 0;

  /** @param alpha [rows, components] */
  add({ components, width, mean, vectors }: Subspace, rows: Float32Array, alpha: Float32Array): void {
    for (let row = 0; row < rows.length / width; row++) {
      for (let i = 0; i < width; i++) {
        const x = rows[row * width + i]! - (mean?.[i] ?? 0);
        let made = 0;
        for (let k = 0; k < components; k++) made += alpha[row * components + k]! * vectors[k * width + i]!;
        this.#whole += x * x;
        this.#lost += (x - made) ** 2;
      }
    }
  }

  get share(): number {
    return this.#whole > 0 ? Math.max(0, 1 - this.#lost / this.#whole) : 1;
  }
}
