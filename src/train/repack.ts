/**
 * A pack whose components were trained for a new task: the same modules with the new components, every old task solved again
 * for its factors, the new task behind them. What tasks bring beside coefficients stays as it is, byte for byte.
 */

import { type ModuleSpace, openModule, projectModule } from "../extract/project.ts";
import type { Subspace } from "../extract/subspace.ts";
import {
  basisIdOf,
  encodeBasis,
  encodeTask,
  type ModuleInput,
  type ParameterInput,
  type SideInput,
  type TensorInput,
  type TermInput,
} from "../format/encode.ts";
import {
  type Coefficients,
  FINGERPRINT_SIZE,
  type PackModule,
  type Side,
  type TaskBlob,
  type TaskFile,
  type TaskTerm,
  type TensorRef,
} from "../format/format.ts";
import { layoutFresh, type TaskToWrite } from "../format/layout.ts";
import { encodedTensor } from "../format/tensors.ts";
import { expandTerm } from "../pack/expand.ts";
import type { Pack } from "../pack/pack.ts";
import { type Dtype, decodeTensor } from "../tensor/dtypes.ts";
import { encodeTensor } from "../tensor/encode.ts";
import { VERSION } from "../version.ts";
import type { Terms } from "./terms.ts";

/**
 * @param parameters of `terms`, components among them
 * @param learned the new task, made with these components
 * @throws RangeError when a component does not fit the type that the pack stores
 */
export async function repack(
  pack: Pack,
  terms: Terms,
  parameters: Float32Array<ArrayBuffer>,
  learned: TaskFile,
): Promise<Uint8Array<ArrayBuffer>> {
  const shared = await pack.bases();
  const { bytes: bases } = shared;
  const { mode, gauge, centering, rank, baseModel } = pack.directory.basis;
  const sides = pack.modules.map(
    (module) => [sideOf(module, "A", bases, terms, parameters), sideOf(module, "B", bases, terms, parameters)] as const,
  );
  const spaces = pack.modules.map(({ name }, i): ModuleSpace | undefined => {
    const [A, B] = sides[i]!;
    if (!A || !B || !terms.part(parameters, name, "componentsA")) return undefined;
    const { in: inputs, out } = pack.modules[i]!;
    const stored = (side: SideInput, width: number) => ({
      dtype: side.dtype,
      components: side.K,
      width,
      mean: side.mean,
      encoded: side.encoded,
    });
    return openModule({ A: stored(A, inputs), B: stored(B, out) });
  });
  const tasks: TaskToWrite[] = [];
  const captured = pack.modules.map(() => ({ A: new Captured(), B: new Captured() }));
  for (const { id, adapterBytes, metadata, brings } of pack.tasks.values()) {
    const blob = await pack.load(id);
    const solved = blob.terms.map((term) =>
      solve(blob, term, pack.modules[term.module]!, bases, spaces[term.module], captured[term.module]!),
    );
    tasks.push({
      entry: { id, adapterBytes, metadata, brings },
      blob: encodeTask(
        solved,
        blob.parameters.map((one) => ({ ...one, ...stored(blob.bytes, one.tensor) }) as ParameterInput),
      ),
    });
  }
  const { id, adapterBytes, metadata, brings } = learned;
  tasks.push({ entry: { id, adapterBytes, metadata, brings }, blob: learned.blob });
  const modules = pack.modules.map(({ name, out, in: inputs, layout, kernel, fingerprint }, i): ModuleInput => {
    const [A, B] = sides[i]!;
    const share = (side: SideInput | undefined, which: "A" | "B"): SideInput | undefined =>
      side && { ...side, explained: side.explained * captured[i]![which].share };
    return {
      name,
      out,
      in: inputs,
      layout,
      kernel,
      A: share(A, "A"),
      B: share(B, "B"),
      fingerprint: fingerprint === undefined ? undefined : floatsAt(bases, fingerprint, FINGERPRINT_SIZE),
    };
  });
  const made = encodeBasis({ producer: `eigenlora ${VERSION}`, mode, gauge, centering, rank, baseModel, modules });
  const chunks = layoutFresh({ ...made, basisId: await basisIdOf(made.description, made.bases), tasks });
  shared.close();
  return new Uint8Array(await new Blob(chunks as BlobPart[]).arrayBuffer());
}

/** Components as they are to be stored: those that were trained, or the pack's own bytes. */
function sideOf(
  module: PackModule,
  which: "A" | "B",
  bases: Uint8Array,
  terms: Terms,
  parameters: Float32Array<ArrayBuffer>,
): SideInput | undefined {
  const side: Side | undefined = module[which];
  if (!side) return undefined;
  const { kind, K, rank, mean, explained, tensor } = side;
  const trained = terms.part(parameters, module.name, `components${which}`);
  const encoded = trained
    ? encodeTensor(tensor.dtype, trained, tensor.rows, tensor.width)
    : stored(bases, tensor).encoded;
  return { kind, K, ...(rank === undefined ? {} : { rank }), mean, dtype: tensor.dtype, explained, encoded };
}

/** A term on the new components: the least squares for the factors that it had on the old ones. */
function solve(
  blob: TaskBlob,
  term: TaskTerm,
  module: PackModule,
  bases: Uint8Array,
  space: ModuleSpace | undefined,
  captured: { A: Captured; B: Captured },
): TermInput {
  const { rank, privateRank, A, B, privateA, privateBt, magnitude } = term;
  const beside = {
    ...(privateA && privateBt
      ? {
          privateTerms: {
            rank: privateRank,
            dtype: privateA.dtype,
            A: stored(blob.bytes, privateA).encoded,
            Bt: stored(blob.bytes, privateBt).encoded,
          },
        }
      : {}),
    ...(magnitude ? { magnitude: stored(blob.bytes, magnitude) } : {}),
  };
  const side = ({ mean, tensor }: Coefficients, basis: Side): NonNullable<TermInput["A"]> => ({
    ...stored(blob.bytes, tensor),
    kind: basis.kind,
    mean,
  });
  if (!A || !B) return { module: term.module, rank, ...beside };
  if (!space) return { module: term.module, rank, A: side(A, module.A!), B: side(B, module.B!), ...beside };
  const old = expandTerm(blob, { ...term, privateRank: 0, privateA: undefined, privateBt: undefined }, module, bases);
  const dtype: Dtype = A.tensor.dtype;
  const found = projectModule(
    space,
    { id: "", rank, A: old.A, Bt: old.Bt },
    { gauge: "as-trained", coefficientDtype: dtype },
  );
  captured.A.add(space.A, old.A, decodeTensor(dtype, found.alphaA, rank, A.tensor.width));
  captured.B.add(space.B, old.Bt, decodeTensor(dtype, found.alphaB, rank, B.tensor.width));
  const solved = (encoded: Uint8Array, basis: Side): NonNullable<TermInput["A"]> => ({
    dtype,
    encoded,
    kind: "column",
    mean: basis.mean,
  });
  return {
    module: term.module,
    rank,
    A: solved(found.alphaA, module.A!),
    B: solved(found.alphaB, module.B!),
    ...beside,
  };
}

function stored(section: Uint8Array, tensor: TensorRef): TensorInput {
  return { dtype: tensor.dtype, encoded: encodedTensor(section, tensor) };
}

function floatsAt(bytes: Uint8Array, offset: number, count: number): Float32Array {
  const view = new DataView(bytes.buffer, bytes.byteOffset + offset, 4 * count);
  return Float32Array.from({ length: count }, (_, i) => view.getFloat32(4 * i, true));
}

/** How much of the tasks' rows about the mean the new components hold. */
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
