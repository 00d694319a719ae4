/**
 * What adapters answer: their own factors and head in the place of those that a pack's coefficients make, in the session that
 * tasks are trained in. Between two such answers lies the divergence that distilling lessens and packing is judged by.
 */

import type { Adapter } from "../adapters/adapter.ts";
import { TaskError } from "../errors.ts";
import type { Session } from "../session/session.ts";
import type { Term } from "../tensor/term.ts";
import type { BatchFeeds } from "./batch.ts";
import type { Unlabelled } from "./examples.ts";
import type { Inputs } from "./inputs.ts";
import { createMachine, headInputs } from "./machine.ts";
import { rowsOf, softmax } from "./probabilities.ts";
import { Terms, type TrainedModule } from "./terms.ts";

export interface AskOptions {
  /** The public function, for messages. */
  readonly where: string;
  readonly inputs: Inputs<BatchFeeds>;
  /** How many texts run together. */
  readonly batch: number;
  readonly signal?: AbortSignal | undefined;
}

/**
 * Probabilities that the adapter itself gives, by text.
 * @param head the layer that it brings, undefined where the model's own outputs are the logits
 * @throws TaskError when it adapts what the pack does not
 */
export async function askAdapter(
  { trainable, pack }: Session,
  adapter: Adapter,
  head: string | undefined,
  rows: readonly Unlabelled<BatchFeeds>[],
  { where, inputs, batch, signal }: AskOptions,
): Promise<Float32Array[]> {
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
  const saved = async (part: string): Promise<Float32Array<ArrayBuffer>> => {
    const found = adapter.saved.find(({ name }) => head !== undefined && name === `${head}.${part}`);
    return Float32Array.from((await found?.read()) ?? []);
  };
  const layer = headInputs(trainable!, head ?? false);
  const [weight, bias] = [await saved("weight"), await saved("bias")];
  const labels = Array.from({ length: layer ? weight.length / layer.in : 0 }, (_, i) => String(i));
  const machine = await createMachine(trainable!, new Terms(modules), layer, labels);
  const answers: Float32Array[] = [];
  const lengths = await inputs.lengths(rows);
  const order = [...rows.entries()].sort(([, a], [, b]) => lengths.get(a)! - lengths.get(b)!);
  // Feeds may be of several lengths.
  const size = rows[0]!.feeds ? 1 : batch;
  for (let at = 0; at < order.length; at += size) {
    signal?.throwIfAborted();
    const some = order.slice(at, at + size);
    const logits = await machine.answer(await inputs.batch(some.map(([, row]) => row)), { terms, weight, bias });
    const each = logits.length / some.length;
    if (!Number.isInteger(each) || each < 2) {
      throw new TypeError(
        `${where}: the model gives ${logits.length} logits for ${some.length} texts, expected [${some.length}, labels]`,
      );
    }
    for (const [i, row] of rowsOf(logits, each).entries()) answers[some[i]![0]] = softmax(row);
  }
  return answers;
}
