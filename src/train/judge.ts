/**
 * Packs judged by behaviour: how far their tasks' answers to plain text are from those of the adapters that they were made of.
 */

import type { Adapter } from "../adapters/adapter.ts";
import { checkAdapters } from "../adapters/modules.ts";
import { checkArgument, checkOptions } from "../arguments.ts";
import { taskAdapter } from "../pack/expand.ts";
import type { Pack } from "../pack/pack.ts";
import type { Engine } from "../session/engine.ts";
import { createSession, type Session } from "../session/session.ts";
import type { SourceInput } from "../source.ts";
import { shuffle, uniform } from "../tensor/random.ts";
import { askAdapter } from "./answers.ts";
import type { BatchFeeds } from "./batch.ts";
import { createInputs, type Encode, type Inputs } from "./inputs.ts";
import { meanDivergence } from "./probabilities.ts";

/** Options of `createJudge`. */
export interface JudgeOptions {
  /** As they were packed. Stay open. */
  readonly adapters: readonly Adapter[];
  /** Plain text of the kind that the tasks are asked about. */
  readonly texts: readonly string[];
  /** Texts as the model's inputs, which are named, one row each: a tokenizer. */
  readonly encode: Encode;
  /** Names of weights or of their initializers in the model, by module name, where they are not found. */
  readonly names?: ReadonlyMap<string, string> | undefined;
  /** Texts that every task is asked, at most. Default: 64, fewer where tasks are many: 1280 texts in all, 16 a task at least. */
  readonly most?: number | undefined;
  /** Texts of a run. Default: 16. */
  readonly batch?: number | undefined;
  /** Default: 0. */
  readonly seed?: number | undefined;
  readonly signal?: AbortSignal | undefined;
}

/** Mean KL(adapter ‖ task) over texts, by task. */
export type DivergenceByTask = ReadonlyMap<string, number>;

/** Asks packs of the same adapters, one after the other. */
export interface PackJudge {
  byTask(pack: Pack): Promise<DivergenceByTask>;
  /** The mean over tasks, as `searchPack` takes it. */
  judge(pack: Pack): Promise<number>;
  /** Frees the session that answers. */
  close(): Promise<void>;
  [Symbol.asyncDispose](): Promise<void>;
}

/**
 * A judge of packs. One session runs adapters and tasks alike, so that nothing but the numbers differs.
 * @param engine runs the model: `createEngine` of a binding makes one
 * @param model path, URL, Blob or bytes of the ONNX model
 * @throws RangeError when there is no text
 * @example
 * const { judge, close } = createJudge(createEngine(ort), "model.onnx", { adapters, texts, encode });
 * const { chunks, report } = await searchPack(adapters, { goal: { kind: "bytes", max: 300_000 }, judge });
 * await close();
 */
export function createJudge(engine: Engine, model: SourceInput, options: JudgeOptions): PackJudge {
  checkArgument("createJudge", engine, "an engine (createEngine(ort))", "load");
  checkOptions("createJudge", options, ["adapters", "texts", "encode", "names", "most", "batch", "seed", "signal"]);
  const { adapters, encode, names, batch = 16, seed = 0, signal } = options;
  const { most = Math.min(64, Math.max(16, Math.round(1280 / adapters.length))) } = options;
  checkAdapters("createJudge: adapters", adapters);
  if (options.texts.length === 0) throw new RangeError("createJudge: no texts");
  const rows = shuffle([...new Set(options.texts)], uniform(seed))
    .slice(0, most)
    .map((text) => ({ text }));
  let session: Session | undefined;
  let inputs: Inputs<BatchFeeds> | undefined;
  const expected = new Map<string, Float32Array[]>();
  const byTask = async (pack: Pack): Promise<DivergenceByTask> => {
    const asked = (session ??= await createSession(engine, model, pack, { trainable: true, names }));
    inputs ??= createInputs(encode, asked.inputNames);
    const ask = { where: "createJudge", inputs, batch, signal };
    const found = new Map<string, number>();
    for (const adapter of adapters) {
      const { id } = adapter;
      const head = headNameOf(adapter);
      const task = await taskAdapter(pack, id);
      const answers = await askAdapter(asked, task, head, rows, ask);
      await task.close();
      if (!expected.has(id)) expected.set(id, await askAdapter(asked, adapter, head, rows, ask));
      found.set(id, meanDivergence(expected.get(id)!, answers));
    }
    return found;
  };
  const close = async (): Promise<void> => {
    await session?.close();
    session = undefined;
  };
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

function headNameOf({ saved }: Adapter): string | undefined {
  return saved
    .find(({ name, role, shape }) => role === "saved" && shape.length === 2 && name.endsWith(".weight"))
    ?.name.slice(0, -".weight".length);
}
