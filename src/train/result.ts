/**
 * What was learned, as a task of the pack: coefficients over its components, private terms, the head.
 */
import { bringsOf } from "../format/brings.ts";
import { encodeTask, encodeTaskFile, type ParameterInput, type TensorInput, type TermInput } from "../format/encode.ts";
import { sharedBases, type TaskMetadata } from "../format/format.ts";
import { misfitLabels } from "../format/heads.ts";
import type { TaskToWrite } from "../format/layout.ts";
import { parseTask } from "../format/task.ts";
import type { Pack } from "../pack/pack.ts";
import { narrowTerms, widthsOf } from "../pack/tasks.ts";
import { storedTask } from "../pack/write.ts";
import { type Dtype, isQuantized, type TaskDtypes } from "../tensor/dtypes.ts";
import { encodeTensor } from "../tensor/encode.ts";
import { type HeadLayer, layersOf } from "./head.ts";
import type { State } from "./state.ts";
import { type LayerSteps, rowsOf, type Stepped, toSteps } from "./steps.ts";
import { storingTrained, type Terms, type TrainedParameter } from "./terms.ts";

/** How a task is stored. */
export interface TaskFileOptions {
  /** In the file; `addTask` may give another. */
  readonly id?: string | undefined;
  /** Number formats; the head's bias is f16 where its weight is integers. Default: f16. */
  readonly dtype?: Partial<TaskDtypes> | undefined;
  /** Beside the labels, for instance a licence. */
  readonly metadata?: TaskMetadata | undefined;
}

/** A task as a file of its own (SPEC.md, section 7), coded where the pack's tasks are: whoever adds it keeps its bytes. */
export function taskFile(pack: Pack, task: TaskToWrite): Uint8Array<ArrayBuffer> {
  const { entry, blob } = storedTask(pack, task);
  return encodeTaskFile(entry, pack.basisId, blob);
}

/**
 * The task, without entropy coding.
 * @param head the layers that `weight` and `bias` are of
 * @throws RangeError when a value does not fit its number format, or the labels are not as many as the head has rows
 * @throws FormatError for metadata that the format does not hold
 */
export function learnedTask(
  pack: Pack,
  trained: Terms,
  { parameters, ...numbers }: Omit<State, "all">,
  head: readonly HeadLayer[],
  { id = "task", dtype = {}, metadata = {}, stored }: TaskFileOptions & Stepped,
): TaskToWrite {
  const { coefficients = "f16", head: headDtype = "f16" } = stored
    ? { ...dtype, coefficients: "int8" as const }
    : dtype;
  const terms: TermInput[] = [];
  for (const [module, own] of pack.modules.entries()) {
    const { name } = own;
    const { A, B } = sharedBases(own) ?? {};
    const of = (kind: TrainedParameter["kind"]): (TensorInput & { rows: number }) | undefined => {
      const [rows, width] = trained.parameter(name, kind)?.dims ?? [];
      if (!rows || width === undefined) return undefined;
      const steps = stored && rowsOf(trained.part(stored.parameters, name, kind)!, rows);
      const values = trained.part(parameters, name, kind)!;
      return { rows, ...tensor(`${kind} of "${name}"`, coefficients, values, rows, width, steps) };
    };
    const [alphaA, alphaB, privateA, privateB] = [of("alphaA"), of("alphaB"), of("privateA"), of("privateB")];
    const shared = alphaA && alphaB && A && B;
    if (!shared && !privateA) continue;
    terms.push({
      module,
      rank: shared ? (A.rank ?? alphaA.rows) : 0,
      ...(shared && { A: { ...alphaA, kind: A.kind, mean: A.mean }, B: { ...alphaB, kind: B.kind, mean: B.mean } }),
      ...(privateA &&
        privateB && {
          privateTerms: { rank: privateA.rows, dtype: coefficients, A: privateA.encoded, Bt: privateB.encoded },
        }),
    });
  }
  const saved = layersOf(head, numbers).flatMap((layer, i) => savedLayer(layer, headDtype, stored?.head[i]));
  const misfit = misfitLabels(metadata.labels, saved);
  if (misfit !== undefined) throw new RangeError(`metadata.labels: ${misfit}`);
  const blob = encodeTask(stored ? narrowTerms(terms, pack.modules.map(widthsOf)) : terms, saved);
  // A writer ends by reading what it wrote.
  const brings = bringsOf(parseTask(blob, pack.modules, "the trained task", { id }), pack.modules);
  return { entry: { id, adapterBytes: 0, metadata, brings }, blob };
}

/** The parameters of a layer of the head. */
function savedLayer(
  { layer, weight, bias }: ReturnType<typeof layersOf>[number],
  dtype: Dtype,
  stored: LayerSteps | undefined,
): ParameterInput[] {
  const { module, in: inputs, out } = layer;
  const name = (part: string): string => `${module}.${part}`;
  const given = stored ? toSteps(weight, stored.weight, stored.largest) : weight;
  const steps = stored && rowsOf(stored.weight, out);
  const made = tensor(`"${name("weight")}"`, dtype, given, out, inputs, steps);
  const saved: ParameterInput = { name: name("weight"), role: "saved", shape: [out, inputs], ...made };
  if (!layer.bias) return [saved];
  // One scale for a whole bias would be coarse and save nothing.
  const added = tensor(`"${name("bias")}"`, isQuantized(dtype) ? "f16" : dtype, bias, 1, out);
  return [saved, { name: name("bias"), role: "saved", shape: [out], ...added }];
}

function tensor(
  what: string,
  dtype: Dtype,
  values: Float32Array,
  rows: number,
  width: number,
  steps?: Float32Array,
): TensorInput {
  return { dtype, encoded: storingTrained(what, () => encodeTensor(dtype, values, rows, width, steps)) };
}
