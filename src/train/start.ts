/**
 * Starting values of training. The coefficients of a pack's tasks show where useful ones lie. Their mean is a start for tasks trained
 * from one seed, whose rows correspond; random ones with their spread are for tasks with seeds of their own (the paper's zero-shot). Rows
 * must differ at the start: identical rows get identical gradients for ever.
 */

import type { Pack } from "../core/pack.ts";
import { parseTaskFile } from "../core/task-file.ts";
import { TaskError } from "../errors.ts";
import { plainTask } from "../format/decode-coded.ts";
import { parseTask } from "../format/directory.ts";
import { moduleOf, readTensor, type TaskBlob } from "../format/format.ts";
import { paced, pacer } from "../pace.ts";
import { normal } from "../tensor/random.ts";
import { type HeadLayer, type LayerNumbers, layersOf, zerosOf } from "./head.ts";
import type { TrainingSetup } from "./objective.ts";
import { type State, stateLike } from "./state.ts";
import { type TrainedParameter, type TrainedTerms, tensorOf } from "./trained-terms.ts";

/**
 * Kinds of starts. "auto" tries mean and random for a few steps and takes the better one. "fresh" begins as PEFT does, without the pack,
 * for factors that are trained themselves.
 */
export type Start = "auto" | "mean" | "random" | "fresh" | { readonly task: string };

/** Largest number of tasks that mean and spread are computed from. */
const MOST_DONORS = 64;

/** Standard deviation of fresh factors and heads, as in PyTorch. */
const SMALL = 0.02;

/** A task to start from. */
export interface Donor {
  readonly id: string;
  readonly blob: TaskBlob;
  /** Names of its head's rows, where it has some. */
  readonly labels: readonly string[] | undefined;
}

/**
 * Reads the task to start from.
 * @param task of the pack, or a task file made for it
 * @throws TaskError when there is no such task, or it belongs to another basis
 * @throws FormatError when the file is damaged
 */
export async function readDonor(pack: Pack, task: string | Uint8Array<ArrayBuffer>): Promise<Donor> {
  if (typeof task === "string") {
    const labels = pack.tasks.get(task)?.metadata.labels;
    if (pack.tasks.has(task)) return { id: task, blob: await pack.load(task), labels };
    throw new TaskError(`there is no task "${task}" to start from`, { task });
  }
  const file = "the task to begin with";
  const { id, basisId, blob, metadata } = parseTaskFile(task, file);
  if (basisId !== pack.basisId)
    throw new TaskError(`task "${id}" belongs to the basis ${basisId}, this pack has ${pack.basisId}`, { task: id });
  const plain = await plainTask(blob, { file, part: file, before: pack.directory.basisBytes });
  return { id, blob: await paced(parseTask(plain, pack.modules, file, { id }), pacer()), labels: metadata.labels };
}

/** @throws TaskError when a task has what is not trained, or a side of a module in another way, which would leave out some of it */
function refuseOthers(pack: Pack, { modules }: TrainedTerms, head: readonly HeadLayer[], { id, blob }: Donor): void {
  const refuse = (what: string): never => {
    throw new TaskError(`task "${id}" has ${what}, which this trainer does not have`, { task: id });
  };
  const layers = new Set(head.map(({ module }) => module));
  const beside = blob.parameters.find(({ role, name }) => role !== "saved" || !layers.has(moduleOf(name)));
  if (beside) refuse(`"${beside.name}" (${beside.role})`);
  for (const { module, rank, A, B, ownA, ownBt, privateRank, magnitude } of blob.terms) {
    const { name } = pack.modules[module]!;
    const trained = modules.find((one) => one.name === name);
    if (!trained) refuse(`terms of "${name}"`);
    if (magnitude) refuse(`a DoRA magnitude of "${name}"`);
    if (privateRank > 0 && trained?.privateRank === 0) refuse(`private terms of "${name}"`);
    const isPlain = rank === 0 || (A?.basis === 0 && B?.basis === 0 && !ownA && !ownBt);
    if (!trained || isPlain) continue;
    const { shared } = trained;
    const isSame =
      shared?.A?.index === A?.basis &&
      shared?.B?.index === B?.basis &&
      shared?.own.A === (ownA !== undefined) &&
      shared.own.B === (ownBt !== undefined);
    if (isSame) continue;
    const advice = pack.tasks.has(id) ? `: make one with \`init: { task: "${id}" }\`` : "";
    throw new TaskError(`task "${id}" has another share of the components of "${name}" than the trainer${advice}`, {
      task: id,
    });
  }
}

/** Makes the state to start from. @throws TaskError when the task to start from has another rank */
export async function startState<Feeds>(
  { pack, terms, origin, model: { head }, labels }: TrainingSetup<Feeds>,
  start: "mean" | "random" | "fresh" | Donor,
  random: () => number,
  signal?: AbortSignal,
): Promise<State> {
  const state = stateLike({ parameters: { length: terms.size }, ...zerosOf(head) });
  const donor = typeof start === "object" ? start : undefined;
  // A LoRA begins with the factors that coefficients make, unless the task to start from has factors of its own.
  const expands = origin !== terms && start !== "fresh" && (!donor || donor.blob.terms.some(({ rank }) => rank > 0));
  if (donor) refuseOthers(pack, expands ? origin : terms, head, donor);
  await fillStart(pack, terms, expands ? "random" : start, state.parameters, random, signal);
  if (expands) {
    const coefficients = new Float32Array(origin.size);
    await fillStart(pack, origin, start, coefficients, random, signal);
    for (const [module, { A, Bt }] of origin.expand(coefficients)) {
      terms.part(state.parameters, module, "privateA")?.set(A);
      terms.part(state.parameters, module, "privateB")?.set(Bt);
    }
  }
  startHead(head, donor, labels, state, random);
  return state;
}

/**
 * Copies each layer from the task to start from if the shapes agree; rows go to the labels of their names, where those are the same. Otherwise
 * the layer with the labels gets small random numbers, and the layers in front of it the model's own.
 */
function startHead(
  head: readonly HeadLayer[],
  donor: Donor | undefined,
  labels: readonly string[],
  state: LayerNumbers,
  random: () => number,
): void {
  for (const { layer, weight, bias } of layersOf(head, state)) {
    const { module, in: inputs, out, own, last } = layer;
    const given = donor && savedTensor(donor.blob, `${module}.weight`, [out, inputs]);
    if (given) {
      const order = last ? orderOf(labels, donor.labels) : undefined;
      weight.set(inOrder(given, order));
      bias.set(inOrder(savedTensor(donor.blob, `${module}.bias`, [out]) ?? new Float32Array(0), order));
    } else if (own) {
      weight.set(own.weight);
      bias.set(own.bias);
    } else fillNormal(weight, random);
  }
}

/** Where each label is among others of the same names; undefined where names differ, or are in the same order. */
function orderOf(labels: readonly string[], others: readonly string[] | undefined): number[] | undefined {
  const order = labels.map((label) => others?.indexOf(label) ?? -1);
  return others?.length === labels.length && !order.includes(-1) ? order : undefined;
}

/** Rows, one for each place in `order`. */
function inOrder(values: Float32Array, order: readonly number[] | undefined): Float32Array {
  const width = order && values.length / order.length;
  if (!width) return values;
  return Float32Array.from(values, (_, i) => values[order[Math.floor(i / width)]! * width + (i % width)]!);
}

function savedTensor({ parameters, bytes }: TaskBlob, name: string, shape: number[]): Float32Array | undefined {
  const found = parameters.find(
    (one) => one.role === "saved" && one.name === name && one.shape.join() === shape.join(),
  );
  return found && readTensor(bytes, found.tensor);
}

function fillNormal(values: Float32Array, random: () => number): void {
  for (let i = 0; i < values.length; i++) values[i] = SMALL * normal(random);
}

/**
 * Writes starting values into all parameters.
 * @throws TaskError when the task to start from has another rank
 */
export async function fillStart(
  pack: Pack,
  terms: TrainedTerms,
  start: "mean" | "random" | "fresh" | Donor,
  out: Float32Array<ArrayBuffer>,
  random: () => number,
  signal?: AbortSignal,
): Promise<void> {
  const moments = await momentsOf(pack, terms, signal);
  for (const parameter of terms.parameters) {
    const { module, kind, dims } = parameter;
    const values = terms.part(out, module, kind)!;
    const given = typeof start === "object" ? tensorOf(pack, start.blob, parameter) : undefined;
    if (given && typeof start === "object") {
      if (given.rows !== dims[0]) {
        const which = kind.startsWith("private") ? "privateTerms" : "rank";
        throw new TaskError(
          `task "${start.id}" has ${which} ${given.rows} on "${module}", the trainer ${dims[0]}: leave \`rank\` and \`privateTerms\` out`,
          { task: start.id },
        );
      }
      readTensor(start.blob.bytes, given, values);
    } else if (kind === "privateB" || kind === "ownB") values.fill(0);
    else if (kind === "privateA" || kind === "ownA") fillNormal(values, random);
    // A module that the task leaves alone changes nothing at first.
    else if (typeof start === "object" && isStill(terms, parameter)) values.fill(0);
    else fillCoefficients(values, moments.get(parameter), start === "mean", random);
  }
}

/** Whether zeros in the place of these coefficients leave a module alone: on one side, which has no mean. */
function isStill({ modules }: TrainedTerms, { module, kind }: TrainedParameter): boolean {
  const { A, B } = modules.find(({ name }) => name === module)!.shared!;
  return kind === (B && !B.mean ? "alphaB" : A && !A.mean ? "alphaA" : undefined);
}

/** Statistics of one parameter [rank, K] over the pack's first tasks. */
interface Moments {
  /** Sums over tasks [rank, K]. */
  readonly sums: Float64Array;
  /** Number of tasks with the row [rank]. */
  readonly tasks: Float64Array;
  /** Sums, and sums of squares, over all rows of all tasks [K]; `count` is the number of rows. */
  readonly columns: Float64Array;
  readonly squares: Float64Array;
  count: number;
}

async function momentsOf(
  pack: Pack,
  terms: TrainedTerms,
  signal?: AbortSignal,
): Promise<Map<TrainedParameter, Moments>> {
  const all = new Map<TrainedParameter, Moments>();
  for (const blob of await firstTasks(pack, MOST_DONORS, signal)) {
    for (const parameter of terms.parameters) {
      const tensor = parameter.kind.startsWith("alpha") ? tensorOf(pack, blob, parameter) : undefined;
      if (!tensor) continue;
      const values = readTensor(blob.bytes, tensor);
      const [rank, K] = parameter.dims;
      const zeros = (length: number): Float64Array => new Float64Array(length);
      const moments = all.get(parameter) ?? {
        ...{ sums: zeros(rank * K), tasks: zeros(rank), columns: zeros(K), squares: zeros(K), count: 0 },
      };
      all.set(parameter, moments);
      moments.count += tensor.rows;
      for (const [i, value] of values.entries()) {
        if (i < rank * K) moments.sums[i]! += value;
        if (i < rank * K && i % K === 0) moments.tasks[i / K]!++;
        moments.columns[i % K]! += value;
        moments.squares[i % K]! += value * value;
      }
    }
  }
  return all;
}

/** Fills in the mean of the tasks' coefficients; random numbers with their spread where no task has the row, or no mean is wanted. */
function fillCoefficients(
  values: Float32Array,
  moments: Moments | undefined,
  mean: boolean,
  random: () => number,
): void {
  if (!moments) return fillNormal(values, random);
  const { sums, tasks, columns, squares, count } = moments;
  const K = columns.length;
  for (let i = 0; i < values.length; i++) {
    const having = tasks[Math.floor(i / K)]!;
    if (mean && having > 0) values[i] = sums[i]! / having;
    else {
      const centre = columns[i % K]! / count;
      const variance = Math.max(0, squares[i % K]! / count - centre * centre);
      values[i] = centre + Math.sqrt(variance) * normal(random);
    }
  }
}

/** Loads tasks all at once, so that a task that is removed meanwhile is still read. */
function firstTasks(pack: Pack, count: number, signal?: AbortSignal): Promise<TaskBlob[]> {
  return Promise.all([...pack.tasks.keys()].slice(0, count).map((id) => pack.load(id, { signal })));
}

/** The most frequent rank among a pack's first tasks; 8 where there are none. */
export async function usualRank(pack: Pack): Promise<number> {
  const counts = new Map<number, number>();
  for (const { terms } of await firstTasks(pack, 8))
    for (const { A, rank } of terms) if (A) counts.set(rank, (counts.get(rank) ?? 0) + 1);
  return [...counts].sort((a, b) => b[1] - a[1])[0]?.[0] ?? 8;
}
