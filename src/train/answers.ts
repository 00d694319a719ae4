/**
 * What adapters answer: their own factors and head in the place of those that a pack's coefficients make, in the session that
 * tasks are trained in. Between two such answers lies the divergence that distilling lessens and packing is judged by.
 */

import type { Adapter } from "../adapters/adapter.ts";
import { TaskError } from "../errors.ts";
import type { Session } from "../session/session.ts";
import type { BatchFeeds } from "./batch.ts";
import type { Row } from "./examples.ts";
import { createMachine, headInputs } from "./machine.ts";
import { type Factors, Terms, type TrainedModule } from "./terms.ts";

/** How texts become rows, and how many run together. */
export interface AskOptions {
  readonly encode?: ((texts: string[]) => BatchFeeds | Promise<BatchFeeds>) | undefined;
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
  rows: readonly Row<BatchFeeds>[],
  { encode, batch, signal }: AskOptions,
): Promise<Float32Array[]> {
  const modules: TrainedModule[] = [];
  const factors = new Map<string, Factors>();
  for (const one of adapter.modules.values()) {
    const { name, in: inputs, out, rank } = one;
    const module = pack.modules.find((known) => known.name === name);
    if (module?.in !== inputs || module.out !== out)
      throw new TaskError(`${adapter.file} adapts "${name}" [${out}, ${inputs}], which the pack does not`, {
        task: adapter.id,
      });
    const { A, Bt } = await one.read();
    modules.push({ name, in: inputs, out, privateRank: rank });
    factors.set(name, { A: Float32Array.from(A), B: Float32Array.from(Bt) });
  }
  const [weight, bias] = (await Promise.all(
    ["weight", "bias"].map(async (part) => {
      const saved = head === undefined ? undefined : adapter.saved.find(({ name }) => name === `${head}.${part}`);
      return Float32Array.from((await saved?.read()) ?? []);
    }),
  )) as [Float32Array<ArrayBuffer>, Float32Array<ArrayBuffer>];
  const layer = headInputs(trainable!, head ?? false);
  const labels = Array.from({ length: layer ? weight.length / layer.in : 0 }, (_, i) => String(i));
  const machine = await createMachine(trainable!, new Terms(modules), layer, { encode, labels });
  const answers: Float32Array[] = [];
  const lengths = await Promise.all(rows.map((row) => machine.length(row)));
  const order = [...rows.keys()].sort((a, b) => lengths[a]! - lengths[b]!);
  // Feeds may be of several lengths.
  const size = rows[0]!.feeds ? 1 : batch;
  for (let at = 0; at < order.length; at += size) {
    signal?.throwIfAborted();
    const places = order.slice(at, at + size);
    const some = places.map((place) => rows[place]!);
    const logits = await machine.answer(await machine.batch(some), { factors, weight, bias });
    const each = logits.length / some.length;
    if (!Number.isInteger(each) || each < 2) {
      throw new TypeError(
        `distill: the model gives ${logits.length} logits for ${some.length} texts, expected [${some.length}, labels]`,
      );
    }
    places.forEach((place, i) => (answers[place] = softmax(logits.subarray(i * each, (i + 1) * each))));
  }
  return answers;
}

function softmax(logits: Float32Array): Float32Array {
  const top = Math.max(...logits);
  const powers = logits.map((value) => Math.exp(value - top));
  const total = powers.reduce((a, b) => a + b, 0);
  return powers.map((value) => value / total);
}

/** The smallest normal f32, in place of probabilities that are too small for one. */
const TINY = 2 ** -126;

/** Mean KL(targets ‖ answers), in nats. */
export function meanDivergence(targets: readonly ArrayLike<number>[], answers: readonly ArrayLike<number>[]): number {
  let sum = 0;
  for (const [i, target] of targets.entries()) {
    for (const [c, p] of Array.from(target).entries())
      if (p > 0) sum += p * Math.log(p / Math.max(answers[i]![c]!, TINY));
  }
  // Of rounded probabilities that are alike it can be a little less than 0.
  return Math.max(0, sum / targets.length);
}
