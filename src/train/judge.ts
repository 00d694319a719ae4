/**
 * Packs judged by behaviour: the distance between their tasks' answers to plain text and the answers of the adapters they were made of.
 */

import type { Adapter } from "../adapters/adapter.ts";
import { checkAdapters } from "../adapters/adapter.ts";
import { checkArgument, checkOptions } from "../arguments.ts";
import type { Pack } from "../core/pack.ts";
import { BackendError } from "../errors.ts";
import { taskAdapter } from "../pack/expand.ts";
import { Queue } from "../queue.ts";
import type { Engine } from "../session/engine.ts";
import { createSession, type Session } from "../session/session.ts";
import { type BatchFeeds, checkTokenizer, type Tokenizer } from "../session/tokens.ts";
import type { SourceInput } from "../source.ts";
import { shuffle, uniform } from "../tensor/random.ts";
import { type AdapterAnswer, answersOf, askAdapter, type Questions, questionsOf } from "./answers.ts";
import { supervisionOf } from "./create-trainer.ts";
import type { Example, Row } from "./examples.ts";
import { madeUpTexts, wordsOf } from "./made-up.ts";
import { MeanDivergence } from "./probabilities.ts";
import type { Supervision } from "./supervision.ts";
import type { SequenceOptions } from "./token-supervision.ts";

/** Options of `createJudge`. Without texts or examples, lines are made of the tokenizer's words, which it must tell. */
export interface JudgeOptions extends Omit<Questions, "feeds">, SequenceOptions {
  /** The adapters that were packed. Stay open. */
  readonly adapters: readonly Adapter[];
  /** Turns texts into the model's inputs, which are named, one row each: a tokenizer. */
  readonly encode: Tokenizer;
  /** Names of weights, or of their initializers in the model, by module name, for weights that are not found. */
  readonly names?: ReadonlyMap<string, string> | undefined;
  /** Largest number of texts for each task. Default: 64; with many tasks fewer, 1280 in all but at least 16 a task. */
  readonly most?: number | undefined;
  /** Default: 0. */
  readonly seed?: number | undefined;
  readonly signal?: AbortSignal | undefined;
}

/** Mean KL(adapter ‖ task) over texts, by task. */
export type DivergenceByTask = ReadonlyMap<string, number>;

/** Judges packs of the same adapters, one after the other. */
export interface PackJudge {
  /** @throws BackendError after `close` */
  byTask(pack: Pack): Promise<DivergenceByTask>;
  /** The mean over tasks. */
  judge(pack: Pack): Promise<number>;
  /** Frees the session after the answers that were asked for before. */
  close(): Promise<void>;
  [Symbol.asyncDispose](): Promise<void>;
}

/**
 * Makes a judge of packs. One session runs adapters and tasks alike, so that nothing but the numbers differs.
 * @param engine runs the model: `createEngine` of a binding makes one
 * @param model path, URL, Blob or bytes of the ONNX model
 * @throws RangeError when there is no text
 * @example
 * const { judge, close } = createJudge(createEngine(ort), "model.onnx", { adapters, texts, encode });
 * const nats = await judge(pack); // a pack of these adapters
 * await close();
 */
export function createJudge(engine: Engine, model: SourceInput, options: JudgeOptions): PackJudge {
  checkArgument("createJudge", engine, "an engine (createEngine(ort))", "load");
  checkOptions("createJudge", options, [
    ...(["adapters", "texts", "examples", "encode", "end", "decoderStart", "names", "most", "seed", "signal"] as const),
  ]);
  const { adapters, names, seed = 0, signal } = options;
  const { most = Math.min(64, Math.max(16, Math.round(1280 / adapters.length))) } = options;
  checkAdapters("createJudge: adapters", adapters);
  checkTokenizer("createJudge: encode", options.encode);
  const all = questionsIn(options, most, seed);
  if (all.length === 0) throw new RangeError("createJudge: no texts");
  const asked = shuffle([...all], uniform(seed)).slice(0, most);
  let session: Session | undefined;
  let closed = false;
  // One session serves all packs, and none is left when it closes.
  const queue = new Queue();
  let supervision: Supervision<BatchFeeds> | undefined;
  let rows: readonly Row<BatchFeeds>[] | undefined;
  const expected = new Map<string, ReadonlyMap<Row<BatchFeeds>, AdapterAnswer>>();
  const ask = async (pack: Pack): Promise<DivergenceByTask> => {
    if (closed) throw new BackendError("this judge is closed; make a new one", { backend: engine.name });
    const open = (session ??= await createSession(engine, model, pack, { trainable: true, names }));
    supervision ??= supervisionOf(open, options);
    rows ??= await supervision.ask(asked, "createJudge");
    const how = { where: "createJudge", supervision, signal };
    const found = new Map<string, number>();
    for (const adapter of adapters) {
      const [id, head] = [adapter.id, headOf(adapter)];
      if (!expected.has(id)) expected.set(id, await answersOf(open, adapter, head, rows, how));
      const between = new MeanDivergence();
      const task = await taskAdapter(pack, id);
      try {
        for await (const { row, logits } of askAdapter(open, task, head, rows, how)) {
          between.add(expected.get(id)!.get(row)!.distributions, logits);
        }
      } finally {
        await task.close();
      }
      found.set(id, between.mean);
    }
    return found;
  };
  const byTask: PackJudge["byTask"] = (pack) => queue.change(() => ask(pack));
  const close: PackJudge["close"] = () =>
    queue.change(async () => {
      closed = true;
      await session?.close();
    });
  return {
    byTask,
    async judge(pack) {
      const all = [...(await byTask(pack)).values()];
      return all.reduce((a, b) => a + b, 0) / all.length;
    },
    close,
    [Symbol.asyncDispose]: close,
  };
}

/** The questions given, each text once; or as many as are asked, made of words. */
function questionsIn(
  { examples, texts, encode, adapters }: JudgeOptions,
  most: number,
  seed: number,
): readonly Example<BatchFeeds>[] {
  if (examples ?? texts) return questionsOf("createJudge", { texts: texts && [...new Set(texts)], examples });
  const words = wordsOf("createJudge", encode, adapters);
  return madeUpTexts(words, most, uniform(seed)).map((text) => ({ text }));
}

/** Names of the layers that the adapter brings whole. */
function headOf({ saved }: Adapter): string[] {
  return saved
    .filter(({ name, role, shape }) => role === "saved" && shape.length === 2 && name.endsWith(".weight"))
    .map(({ name }) => name.slice(0, -".weight".length));
}
