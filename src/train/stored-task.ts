/**
 * Stores what was learned as a task of the pack: coefficients over its components, private terms, the head. In packs
 * with a step, a task that is trained on keeps the steps it was stored with, so that it takes about as many bytes.
 */

import type { Adapter } from "../adapters/adapter.ts";
import type { Pack } from "../core/pack.ts";
import { parseTask } from "../format/directory.ts";
import {
  encodeTask,
  encodeTaskFile,
  type ParameterInput,
  type TaskToWrite,
  type TensorInput,
  type TermInput,
} from "../format/encode.ts";
import { bringsOf, encodedTensor, misfitLabels, type TaskBlob, type TaskMetadata } from "../format/format.ts";
import { atOnce } from "../pace.ts";
import { narrowTerms } from "../pack/tasks.ts";
import { BITS, type Dtype, decodeScales, isQuantized, type TaskDtypes } from "../tensor/dtypes.ts";
import { encodeTensor, toInteger } from "../tensor/encode.ts";
import type { Term } from "../tensor/term.ts";
import { type HeadLayer, layersOf, type State } from "./state.ts";
import { storingTrained, type TrainedParameter, type TrainedTerms, tensorOf } from "./trained-terms.ts";

/** Options of a trained task that is stored. */
export interface TaskFileOptions {
  /** Id in the file; `addTask` may give another. */
  readonly id?: string | undefined;
  /**
   * Number formats. The bias of the head is f16 where the weight is integers. Default: f16; in packs with a step,
   * integers of as many bits as they are worth.
   */
  readonly dtype?: Partial<TaskDtypes> | undefined;
  /** More metadata than the labels, for instance a licence. */
  readonly metadata?: TaskMetadata | undefined;
}

/** Options of `Trainer.task`. */
export interface LearnedTaskOptions extends TaskFileOptions {
  /** Share of its ΔW that the task may lose, in a pack with a step where no `dtype` is given. Default: 0.3. */
  readonly error?: number | undefined;
}

/**
 * Encodes the task, without entropy coding.
 * @param head layers of `weight` and `bias`
 * @throws RangeError when a value does not fit its number format, or the number of labels differs from the head's rows
 * @throws FormatError for metadata that the format does not hold
 */
export function learnedTask(
  pack: Pack,
  trained: TrainedTerms,
  { parameters, ...numbers }: Omit<State, "all">,
  head: readonly HeadLayer[],
  { id = "task", dtype = {}, metadata = {}, stored }: TaskFileOptions & Stepped,
): TaskToWrite {
  const { coefficients = "f16", head: headDtype = "f16" } = stored
    ? { ...dtype, coefficients: "int8" as const }
    : dtype;
  const terms: TermInput[] = [];
  for (const [module, { name }] of pack.modules.entries()) {
    const { shared } = trained.modules.find((module) => module.name === name) ?? {};
    const of = (kind: TrainedParameter["kind"]): (TensorInput & { rows: number }) | undefined => {
      const [rows, width] = trained.parameter(name, kind)?.dims ?? [];
      if (!rows || width === undefined) return undefined;
      const steps = stored && rowsOf(trained.part(stored.parameters, name, kind)!, rows);
      const values = trained.part(parameters, name, kind)!;
      return { rows, ...tensor(`${kind} of "${name}"`, coefficients, values, rows, width, steps) };
    };
    const privateA = of("privateA");
    const privateB = of("privateB");
    if (!shared && !privateA) continue;
    const over = (side: "A" | "B"): TermInput["A"] => {
      const basis = shared?.[side];
      const alpha = of(`alpha${side}`);
      return basis && alpha && { ...alpha, mean: basis.mean, basis: basis.index };
    };
    terms.push({
      module,
      rank: shared?.rank ?? 0,
      A: over("A"),
      B: over("B"),
      ownA: of("ownA"),
      ownBt: of("ownB"),
      ...(privateA &&
        privateB && {
          privateTerms: { rank: privateA.rows, dtype: coefficients, A: privateA.encoded, Bt: privateB.encoded },
        }),
    });
  }
  const saved = layersOf(head, numbers).flatMap((layer, i) => savedLayer(layer, headDtype, stored?.head[i]));
  const misfit = misfitLabels(metadata.labels, saved);
  if (misfit !== undefined) throw new RangeError(`metadata.labels: ${misfit}`);
  const blob = encodeTask(stored ? narrowTerms(terms, pack.modules) : terms, saved);
  // The written task is read back: parsing checks it.
  const brings = bringsOf(atOnce(parseTask(blob, pack.modules, "the trained task", { id })), pack.modules);
  return { entry: { id, adapterBytes: 0, metadata, brings }, blob };
}

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

/** The step of every number that a task stores as an integer. */
export interface TaskSteps {
  readonly parameters: Float32Array<ArrayBuffer>;
  /** Steps of the weight of each layer of the head; undefined for weights in another number format. */
  readonly head: readonly (LayerSteps | undefined)[];
}

interface LayerSteps {
  readonly weight: Float32Array<ArrayBuffer>;
  /** Largest integer of the weight's number format. */
  readonly largest: number;
}

/** Option of what is trained, or stored, as integers. */
export interface Stepped {
  /** Steps of the integers. Default: number formats decide how numbers are stored. */
  readonly stored?: TaskSteps | undefined;
}

/** Steps of a stored task; undefined in packs without a step. */
export function stepsOf(
  pack: Pack,
  terms: TrainedTerms,
  blob: TaskBlob,
  head: readonly Pick<HeadLayer, "module">[],
): TaskSteps | undefined {
  if (pack.directory.basis.step === undefined) return undefined;
  const parameters = new Float32Array(terms.size);
  for (const parameter of terms.parameters) {
    const tensor = tensorOf(pack, blob, parameter);
    const part = terms.part(parameters, parameter.module, parameter.kind)!;
    if (tensor) part.set(ofRows(decodeScales(encodedTensor(blob.bytes, tensor), tensor.rows), tensor.width));
  }
  return { parameters, head: head.map(({ module }) => layerSteps(blob, module)) };
}

function layerSteps(blob: TaskBlob, module: string): LayerSteps | undefined {
  const stored = blob.parameters.find(({ name }) => name === `${module}.weight`)?.tensor;
  if (!stored || !isQuantized(stored.dtype)) return undefined;
  const { dtype, rows, width } = stored;
  const weight = ofRows(decodeScales(encodedTensor(blob.bytes, stored), rows), width);
  return { weight, largest: 2 ** (BITS[dtype] - 1) - 1 };
}

function ofRows(scales: Float32Array, width: number): Float32Array<ArrayBuffer> {
  return Float32Array.from({ length: scales.length * width }, (_, i) => scales[Math.floor(i / width)]!);
}

/**
 * Rounds numbers to multiples of their steps, as they will be read.
 * @param largest integer, in magnitude. Default: that of int8
 */
export function toSteps(values: Float32Array, steps: Float32Array, largest: number = 127): Float32Array<ArrayBuffer> {
  return Float32Array.from(values, (value, i) => {
    const step = steps[i]!;
    return step > 0 ? toInteger(value / step, largest) * step : 0;
  });
}

/** Step of each row. @param steps [rows, width]; 0 for rows without numbers */
export function rowsOf(steps: Float32Array, rows: number): Float32Array {
  const width = steps.length / rows;
  return Float32Array.from({ length: rows }, (_, row) => steps[row * width] ?? 0);
}

// A learned task is added to a pack with a step as adapters are: as coefficients over shared components and as residual
// rows, in integers of as many bits as they are worth.

interface Learned {
  readonly id: string;
  readonly metadata: TaskMetadata;
  readonly terms: ReadonlyMap<string, Term>;
  readonly head: ReturnType<typeof layersOf>;
}

/**
 * The task's file.
 * @param error the share of its ΔW that it may lose
 * @throws AdapterError for values that no pack can hold
 */
export async function smallTask(pack: Pack, learned: Learned, error: number): Promise<Uint8Array<ArrayBuffer>> {
  const formats = { basis: "f16", coefficients: "f16", head: "int4" } as const;
  // Learning alone does without what makes packs.
  const { projectAdapters } = await import("../pack/add.ts");
  const [task] = await projectAdapters(pack, [adapterOf(pack, learned)], formats, { error });
  return encodeTaskFile(task!.entry, pack.basisId, task!.blob);
}

function adapterOf({ name: file, modules }: Pack, { id, metadata, terms, head }: Learned): Adapter {
  const own = modules.flatMap(({ A: _, B: __, fingerprint: ___, ...module }) => {
    const term = terms.get(module.name);
    return term ? [[module.name, { ...module, rank: term.rank, read: async () => term }] as const] : [];
  });
  const saved = head.flatMap(({ layer: { module, in: inputs, out, bias: hasBias }, weight, bias }) => [
    { name: `${module}.weight`, role: "saved" as const, shape: [out, inputs], read: async () => weight },
    ...(hasBias ? [{ name: `${module}.bias`, role: "saved" as const, shape: [out], read: async () => bias }] : []),
  ]);
  const nothing = { byteLength: 0, baseModel: undefined, warnings: [], close: async () => {} };
  return { id, file, modules: new Map(own), saved, metadata, ...nothing };
}
