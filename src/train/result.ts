/**
 * What was learned, as a task file (SPEC.md, section 7): coefficients over the pack's components, free terms, the head.
 */

import { encodeTask, encodeTaskFile, type ParameterInput, type TermInput } from "../format/encode.ts";
import type { TaskMetadata } from "../format/format.ts";
import { parseTask } from "../format/task.ts";
import type { Pack } from "../pack/pack.ts";
import { type Dtype, isQuantized } from "../tensor/dtypes.ts";
import { encodeTensor } from "../tensor/encode.ts";
import type { Terms, TrainedParameter } from "./terms.ts";

export interface Learned {
  /** All parameters of terms, in one. */
  readonly parameters: Float32Array<ArrayBuffer>;
  readonly terms: Terms;
  /** Weight [labels, in], bias [labels] where the layer has one. */
  readonly head:
    | {
        readonly module: string;
        readonly in: number;
        readonly weight: Float32Array;
        readonly bias: Float32Array | undefined;
      }
    | undefined;
}

/** Number formats: of coefficients and free terms, and of the head, whose bias is f16 where its weight is integers. */
export interface TaskDtypes {
  readonly coefficients: Dtype;
  readonly head: Dtype;
}

/**
 * @throws FormatError when a value does not fit its type
 */
export function taskFile(
  pack: Pack,
  id: string,
  { parameters, terms: trained, head }: Learned,
  types: TaskDtypes,
  metadata: TaskMetadata,
): Uint8Array<ArrayBuffer> {
  const terms: TermInput[] = [];
  for (const [module, { name, A, B }] of pack.modules.entries()) {
    const of = (kind: TrainedParameter["kind"]): { rows: number; encoded: Uint8Array; dtype: Dtype } | undefined => {
      const values = trained.part(parameters, name, kind);
      if (!values) return undefined;
      const [rows, width] = trained.parameters.find(
        (parameter) => parameter.module === name && parameter.kind === kind,
      )!.dims;
      return { rows, dtype: types.coefficients, encoded: encodeTensor(types.coefficients, values, rows, width) };
    };
    const [alphaA, alphaB, ownA, ownB] = [of("alphaA"), of("alphaB"), of("A"), of("B")];
    const shared = alphaA && alphaB && A && B;
    if (!shared && !ownA) continue;
    terms.push({
      module,
      rank: shared ? (A.rank ?? alphaA.rows) : 0,
      ...(shared ? { A: { ...alphaA, kind: A.kind, mean: A.mean }, B: { ...alphaB, kind: B.kind, mean: B.mean } } : {}),
      ...(ownA && ownB
        ? { privateTerms: { rank: ownA.rows, dtype: types.coefficients, A: ownA.encoded, Bt: ownB.encoded } }
        : {}),
    });
  }
  const saved = head ? headParameters(head, types.head) : [];
  const blob = encodeTask(terms, saved);
  // A writer ends by reading what it wrote.
  parseTask(blob, pack.modules, "the trained task", id);
  const own = terms.filter((term) => term.privateTerms).map(({ module }) => `private ${pack.modules[module]!.name}`);
  const brings = [...saved.map(({ role, name }) => `${role} ${name}`), ...own];
  return encodeTaskFile({ id, adapterBytes: 0, metadata, brings }, pack.basisId, blob);
}

function headParameters(
  { module, in: inputs, weight, bias }: NonNullable<Learned["head"]>,
  type: Dtype,
): ParameterInput[] {
  const labels = weight.length / inputs;
  // One scale for a whole bias would be coarse and save nothing.
  const biasType = isQuantized(type) ? "f16" : type;
  const saved = [
    {
      name: `${module}.weight`,
      role: "saved" as const,
      shape: [labels, inputs],
      dtype: type,
      encoded: encodeTensor(type, weight, labels, inputs),
    },
  ];
  if (!bias) return saved;
  return [
    ...saved,
    {
      name: `${module}.bias`,
      role: "saved",
      shape: [labels],
      dtype: biasType,
      encoded: encodeTensor(biasType, bias, 1, labels),
    },
  ];
}
