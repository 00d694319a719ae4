/**
 * What adapters answer: their own factors and head in the place of those that a pack's coefficients make, in the session that
 * tasks are trained in. Between two such answers lies the divergence that distilling lessens and packing is judged by.
 */

import type { Adapter } from "../adapters/adapter.ts";
import { TaskError } from "../errors.ts";
import type { Session } from "../session/session.ts";
import type { Term } from "../tensor/term.ts";
import type { BatchFeeds } from "./batch.ts";
import type { Example, Row, Unlabelled } from "./examples.ts";
import { layersOf, zerosOf } from "./head.ts";
import type { Lessons } from "./lessons.ts";
import { createMachine, headInputs } from "./machine.ts";
import { answers } from "./objective.ts";
import type { Distribution } from "./probabilities.ts";
import type { Machine, Point } from "./subject.ts";
import { Terms, type TrainedModule } from "./terms.ts";

/** What is asked: texts, or inputs, or examples as a trainer takes them, whose answers do not count. */
export interface Questions {
  /** Plain text of the kind that the task is asked about. A language model is asked at every token. */
  readonly texts?: readonly string[] | undefined;
  /** Instead of texts: the model's inputs of each, batches of one. */
  readonly feeds?: readonly BatchFeeds[] | undefined;
  /** Instead of texts: examples. A language model is asked at the tokens of completions. */
  readonly examples?: readonly Example<BatchFeeds>[] | undefined;
}

/** @throws TypeError unless questions are given in one way */
export function questionsOf(where: string, { texts, feeds, examples }: Questions): readonly Example<BatchFeeds>[] {
  if ([texts, feeds, examples].filter((one) => one !== undefined).length !== 1)
    throw new TypeError(`${where}: expected texts, feeds or examples, one of them`);
  return examples ?? texts?.map((text) => ({ text })) ?? feeds!.map((own): Unlabelled<BatchFeeds> => ({ feeds: own }));
}

export interface AskOptions {
  /** The public function, for messages. */
  readonly where: string;
  readonly lessons: Lessons<BatchFeeds>;
  readonly signal?: AbortSignal | undefined;
}

/**
 * The adapter itself as a model is fed with it, and the machine that is.
 * @param head the layers that it brings, empty where the model's own outputs are the logits
 * @throws TaskError when it adapts what the pack does not
 */
export async function adapterPoint(
  session: Session,
  adapter: Adapter,
  head: readonly string[],
): Promise<{ readonly machine: Machine<BatchFeeds>; readonly point: Point }> {
  // Not as a parameter's pattern: what is internal must not show in declarations.
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
    const { A, Bt } = await one.read();
    terms.set(name, { rank, A, Bt });
  }
  const layers = headInputs(trainable!, head);
  const saved = (module: string | undefined, part: string) =>
    adapter.saved.find(({ name }) => name === `${module}.${part}`);
  const last = layers.find(({ out }) => out === undefined);
  const labels = Array.from({ length: saved(last?.module, "weight")?.shape[0] ?? 0 }, (_, i) => String(i));
  const machine = await createMachine(trainable!, new Terms(modules), layers, labels);
  const numbers = zerosOf(machine.head);
  for (const { layer, weight, bias } of layersOf(machine.head, numbers)) {
    const { module, own } = layer;
    // What it does not bring is the model's.
    weight.set((await saved(module, "weight")?.read()) ?? own?.weight ?? []);
    bias.set((await saved(module, "bias")?.read()) ?? own?.bias ?? []);
  }
  return { machine, point: { terms, ...numbers } };
}

/**
 * Logits that the adapter itself gives, by row.
 * @param head as of `adapterPoint`
 * @throws TaskError as `adapterPoint`
 */
export async function* askAdapter(
  session: Session,
  adapter: Adapter,
  head: readonly string[],
  rows: readonly Row<BatchFeeds>[],
  { where, lessons, signal }: AskOptions,
): AsyncGenerator<{ readonly row: Row<BatchFeeds>; readonly logits: Float32Array[] }> {
  const { machine, point } = await adapterPoint(session, adapter, head);
  for await (const one of answers({ machine, lessons }, rows, point, signal)) {
    const each = one.logits[0]!.length;
    if (!Number.isInteger(each) || each < 2)
      throw new TypeError(`${where}: the model gives ${each} logits for a text, expected [texts, labels]`);
    yield one;
  }
}

/** What the adapter answers, by row, as far as it is worth keeping. */
export async function answersOf(...of: Parameters<typeof askAdapter>): Promise<Map<Row<BatchFeeds>, Distribution[]>> {
  const { lessons } = of[4];
  const found = new Map<Row<BatchFeeds>, Distribution[]>();
  for await (const { row, logits } of askAdapter(...of)) found.set(row, logits.map(lessons.distribution));
  return found;
}
