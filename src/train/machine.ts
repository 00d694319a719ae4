/**
 * A session of onnxruntime as a machine that a trainer trains with: factors and a head in, logits, loss and gradients out.
 */

import { makeTensor, type Ort, type OrtTensor } from "../../bindings/ort.ts";
import { boolean, dataOf, type Trainable } from "../../bindings/ort-training.ts";
import { BaseMismatchError } from "../errors.ts";
import { turn } from "../session/plan.ts";
import { type BatchFeeds, toTensors } from "./batch.ts";
import type { Machine, Point } from "./subject.ts";
import type { Terms } from "./terms.ts";

/** The inputs of a head: its weight [1, in, labels], its bias [1, 1, labels]. */
export interface Head {
  readonly module: string;
  readonly in: number;
  readonly weight: string;
  readonly bias: string | undefined;
}

/** @throws RangeError when the session was not made to train the layer */
export function headOf<O extends Ort>({ inputs }: Trainable<O>, wanted: string | false | undefined): Head | undefined {
  const weights = inputs.filter(({ kind }) => kind === "headWeight");
  if (wanted === false || (wanted === undefined && weights.length === 0)) return undefined;
  const weight = weights.find(({ of }) => of === (wanted ?? of));
  if (!weight) {
    const there = weights.map(({ of }) => `"${of}"`).join(", ") || "none";
    throw new RangeError(`head: the session trains ${there}, not "${wanted}"; create it with head: "${wanted}"`);
  }
  const bias = inputs.find(({ kind, of }) => kind === "headBias" && of === weight.of);
  return { module: weight.of, in: weight.dims[1] as number, weight: weight.name, bias: bias?.name };
}

export async function createMachine<O extends Ort>(
  source: Trainable<O>,
  terms: Terms,
  head: Head | undefined,
  labels: readonly string[],
): Promise<Machine<BatchFeeds>> {
  const { ort, graph, inputs } = source;
  const input = (of: string, kind: "A" | "B"): string => inputs.find((one) => one.of === of && one.kind === kind)!.name;
  const modules = terms.modules.map((module) => ({
    ...module,
    A: input(module.name, "A"),
    B: input(module.name, "B"),
  }));
  const gradient = (of: string): string => graph.gradients.get(of)!;
  const fetches = [...modules.flatMap(({ A, B }) => [A, B]), head?.weight, head?.bias]
    .filter((name) => name !== undefined)
    .map(gradient);
  const floats = (data: Float32Array, ...dims: number[]): OrtTensor => makeTensor(ort, data, dims);
  const idle: Record<string, OrtTensor> = {};
  for (const [name, { data, dims }] of await source.base()) idle[name] = makeTensor(ort, data, [1, ...dims]);

  /** Inputs of a batch and a task. */
  const feedsOf = (batch: BatchFeeds, { terms: values, weight, bias }: Point): Record<string, OrtTensor> => {
    const feeds = { ...toTensors(ort, batch), ...idle };
    for (const { name, in: inputs, out, A, B } of modules) {
      const { rank, ...term } = values.get(name)!;
      feeds[A] = floats(turn(term.A, rank, inputs), 1, inputs, rank);
      feeds[B] = floats(term.Bt, 1, rank, out);
    }
    if (head) feeds[head.weight] = floats(turn(weight, labels.length, head.in), 1, head.in, labels.length);
    if (head?.bias !== undefined) feeds[head.bias] = floats(bias, 1, 1, labels.length);
    return feeds;
  };
  const take = async (tensor: OrtTensor | undefined): Promise<Float32Array<ArrayBuffer>> =>
    tensor ? (((await dataOf(tensor)) as Float32Array).slice() as Float32Array<ArrayBuffer>) : new Float32Array(0);
  const check = (logits: Float32Array, rows: number): Float32Array => {
    const expected = rows * labels.length;
    if (logits.length === expected) return logits;
    const message = `the model gives ${logits.length} logits for ${rows} rows of ${labels.length} labels`;
    throw new BaseMismatchError(message, { module: graph.logitsOutput, expected, found: logits.length });
  };

  return {
    head: head && { module: head.module, in: head.in, bias: head.bias !== undefined },

    async answer(batch, point) {
      const none = { [graph.learnInput]: boolean(ort, false), [graph.targetsInput]: floats(new Float32Array(1), 1, 1) };
      const results = await source.run({ ...feedsOf(batch, point), ...none }, [graph.logitsOutput]);
      return take(results[graph.logitsOutput]);
    },

    async step(batch, point, targets) {
      const rows = targets.length / labels.length;
      const learn = {
        [graph.learnInput]: boolean(ort, true),
        [graph.targetsInput]: floats(targets, rows, labels.length),
      };
      const results = await source.run({ ...feedsOf(batch, point), ...learn }, [
        graph.lossOutput,
        graph.logitsOutput,
        ...fetches,
      ]);
      const of = (name: string | undefined): Promise<Float32Array<ArrayBuffer>> =>
        take(name === undefined ? undefined : results[gradient(name)]);
      const logits = check(await take(results[graph.logitsOutput]), rows);
      const slopes = new Map(
        await Promise.all(
          modules.map(async ({ name, in: inputs, A, B }) => {
            const a = await of(A);
            const rank = a.length / inputs;
            return [name, { rank, A: turn(a, inputs, rank), Bt: await of(B) }] as const;
          }),
        ),
      );
      const weight = head
        ? (turn(await of(head.weight), head.in, labels.length) as Float32Array<ArrayBuffer>)
        : new Float32Array(0);
      const bias = head?.bias === undefined ? new Float32Array(head ? labels.length : 0) : await of(head.bias);
      return { loss: (await take(results[graph.lossOutput]))[0]!, logits, gradients: { terms: slopes, weight, bias } };
    },
  };
}
