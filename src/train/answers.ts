/**
 * Answers of adapters. An adapter's own factors and head take the place of those that a pack's coefficients make, in the session that
 * trains tasks. Distilling reduces the divergence between the two answers; packing is judged by it.
 */

import type { Adapter } from "../adapters/adapter.ts";
import { TaskError } from "../errors.ts";
import type { Session } from "../session/session.ts";
import type { BatchFeeds } from "../session/tokens.ts";
import type { Term } from "../tensor/term.ts";
import type { Example, Row, Unlabelled } from "./examples.ts";
import { layersOf, zerosOf } from "./head.ts";
import { type AnsweredRow, answers } from "./objective.ts";
import type { Distribution } from "./probabilities.ts";
import type { Supervision } from "./supervision.ts";
import { headInputs, sessionModel, type TaskWeights, type TrainableModel } from "./trainable-model.ts";
import { type TrainedModule, TrainedTerms } from "./trained-terms.ts";

/** Questions to a model: texts, inputs, or a trainer's examples. Labels in examples are ignored. */
export interface Questions {
  /** Plain text of the kind that the task will see. A language model is asked at every token. */
  readonly texts?: readonly string[] | undefined;
  /** The model's inputs, a batch of one for each question, instead of texts. */
  readonly feeds?: readonly BatchFeeds[] | undefined;
  /** Examples instead of texts. A language model is asked at the tokens of completions. */
  readonly examples?: readonly Example<BatchFeeds>[] | undefined;
}

/** @throws TypeError unless questions are given in one way */
export function questionsOf(where: string, { texts, feeds, examples }: Questions): readonly Example<BatchFeeds>[] {
  const ways = Object.entries({ texts, feeds, examples }).flatMap(([name, one]) => (one === undefined ? [] : [name]));
  if (ways.length !== 1) throw new TypeError(`${where}: got ${ways.join(" and ") || "no texts"}, expected one of them`);
  return examples ?? texts?.map((text) => ({ text })) ?? feeds!.map((own): Unlabelled<BatchFeeds> => ({ feeds: own }));
}

export interface AskOptions {
  /** Name of the public function, for messages. */
  readonly where: string;
  readonly supervision: Supervision<BatchFeeds>;
  readonly signal?: AbortSignal | undefined;
}

/**
 * Makes a model and the weights with which it answers as the adapter itself.
 * @param head the layers that the adapter brings; empty where the model's own outputs are the logits
 * @throws TaskError when the adapter changes a module that the pack lacks
 */
export async function adapterWeights(
  session: Session,
  adapter: Adapter,
  head: readonly string[],
): Promise<{ readonly model: TrainableModel<BatchFeeds>; readonly weights: TaskWeights }> {
  // Destructured here rather than in the parameter list, so that internal names stay out of the declarations.
  const { trainable, pack } = session;
  const modules: TrainedModule[] = [];
  const terms = new Map<string, Term>();
  for (const one of adapter.modules.values()) {
    const { name, in: width, out, rank } = one;
    const module = pack.modules.find((known) => known.name === name);
    if (module?.in !== width || module.out !== out)
      throw new TaskError(`${adapter.file} adapts "${name}" [${out}, ${width}], which the pack does not`, {
        task: adapter.id,
      });
    modules.push({ name, in: width, out, privateRank: rank });
    const { A, Bt, magnitude } = await one.read();
    if (magnitude)
      throw new TaskError(`${adapter.file} has a DoRA magnitude of "${name}": it cannot be asked here`, {
        task: adapter.id,
      });
    terms.set(name, { rank, A, Bt });
  }
  const beside = adapter.saved.find(({ role }) => role !== "saved");
  if (beside)
    throw new TaskError(`${adapter.file} brings "${beside.name}" (${beside.role}): it cannot be asked here`, {
      task: adapter.id,
    });
  const layers = headInputs(trainable!, head);
  const saved = (module: string | undefined, part: string) =>
    adapter.saved.find(({ name }) => name === `${module}.${part}`);
  const last = layers.find(({ out }) => out === undefined);
  const labels = Array.from({ length: saved(last?.module, "weight")?.shape[0] ?? 0 }, (_, i) => String(i));
  const model = await sessionModel(trainable!, new TrainedTerms(modules), layers, labels);
  const numbers = zerosOf(model.head);
  for (const { layer, weight, bias } of layersOf(model.head, numbers)) {
    const { module, own } = layer;
    // Tensors that the adapter lacks come from the model.
    weight.set((await saved(module, "weight")?.read()) ?? own?.weight ?? []);
    bias.set((await saved(module, "bias")?.read()) ?? own?.bias ?? []);
  }
  return { model, weights: { terms, ...numbers } };
}

/**
 * Answers of the adapter itself, row by row.
 * @param head as in `adapterWeights`
 * @throws TaskError as `adapterWeights`
 */
export async function* askAdapter(
  session: Session,
  adapter: Adapter,
  head: readonly string[],
  rows: readonly Row<BatchFeeds>[],
  { where, supervision, signal, features }: AskOptions & { readonly features?: boolean | undefined },
): AsyncGenerator<AnsweredRow<BatchFeeds>> {
  const { model, weights } = await adapterWeights(session, adapter, head);
  for await (const one of answers({ model, supervision }, rows, weights, { signal, features })) {
    const each = one.logits[0]!.length;
    if (!Number.isInteger(each) || each < 2)
      throw new TypeError(`${where}: the model gives ${each} logits for a text, expected [texts, labels]`);
    yield one;
  }
}

/** An answer that is small enough to keep. */
export interface AdapterAnswer {
  readonly distributions: readonly Distribution[];
  readonly features: Float32Array | undefined;
}

/** Answers of the adapter by row. */
export async function answersOf(...of: Parameters<typeof askAdapter>): Promise<Map<Row<BatchFeeds>, AdapterAnswer>> {
  const { supervision } = of[4];
  const found = new Map<Row<BatchFeeds>, AdapterAnswer>();
  for await (const { row, logits, features } of askAdapter(...of))
    found.set(row, { distributions: logits.map(supervision.distribution), features });
  return found;
}
