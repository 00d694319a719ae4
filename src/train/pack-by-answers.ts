/**
 * The smallest pack whose tasks still answer as their adapters do, with nothing asked of the user: components that all tasks share, each
 * task distilled onto them, its answers judged by questions that were held back. How coarse numbers may be is tried on a few tasks. A task
 * that does not come close enough is stored closer to its adapter; where time runs out, as a pack without a model stores it.
 */
import type { Adapter } from "../adapters/adapter.ts";
import { checkAdapters } from "../adapters/modules.ts";
import { checkArgument, checkOptions, checkPack } from "../arguments.ts";
import { openPack } from "../core/open-pack.ts";
import type { Pack } from "../core/pack.ts";
import { parseTaskFile } from "../core/task-file.ts";
import { encodeTaskFile } from "../format/encode.ts";
import { placeOf } from "../format/layout.ts";
import type { ModelInput } from "../onnx/whole.ts";
import { projectAdapters, storedDtypes } from "../pack/add.ts";
import { DEFAULT_ERROR } from "../pack/allocate.ts";
import { type Built, buildPack } from "../pack/build.ts";
import type { BuildReport } from "../pack/report.ts";
import { searchPack } from "../pack/search.ts";
import { spread } from "../pack/sharing.ts";
import { allOf, freshPack } from "../pack/write.ts";
import { createSession } from "../session/create-session.ts";
import type { Engine } from "../session/engine.ts";
import { Answering, type AnsweringTask, type ByAnswersOptions, type Open } from "./answering.ts";
import { checkNumbers } from "./checks.ts";
import { checkQuestions } from "./taught.ts";

/** Report of `packByAnswers`. What it says of ΔW and terms is from before tasks were distilled. */
export interface ByAnswersReport extends BuildReport {
  /** Empty where tasks would take no fewer bytes than in a pack without a model, which it is then. */
  readonly answers: readonly AnsweringTask[];
  /** Steps of each task. */
  readonly steps: number;
  /** Whether it was stopped before all tasks were done. */
  readonly stopped: boolean;
}

/** A pack that was made for some size. */
interface Level extends Open {
  readonly size: number;
  readonly report: BuildReport;
  readonly close: () => Promise<void>;
}

const OPTIONS = [
  ...(["adapters", "encode", "texts", "examples", "end", "decoderStart", "names", "base", "anyBase"] as const),
  ...(["agreement", "minutes", "steps", "seed", "signal", "onProgress", "finished", "workers"] as const),
] as const;

/** Fewer tasks than this share too little for components of all. */
const FEW = 8;
/** Components of a side: of 20 to 40, on two suites of 20 and 53 adapters, those whose answers lost least for their bytes. */
const COMPONENTS = 36;
/** Steps of numbers, from few bytes to many: each pack is about a fifth larger than the one before. */
const STEPS = [0.14, 0.1, 0.07, 0.05, 0.035, 0.025, 0.018] as const;
/** The same for tasks by themselves: shares of ΔW that may be lost. */
const ERRORS = [0.6, 0.45, 0.34, 0.25, DEFAULT_ERROR] as const;
/** Where trying begins. */
const FIRST = { shared: 3, alone: 2 };
/** Sizes that are expected to be tried. */
const EXPECTED = 3;
/** Tasks that sizes are tried on. */
const TRIED = 6;

/**
 * Distils adapters onto the components of a pack that exists. The pack stays as it is.
 * @param pack without tasks of these ids
 * @returns a task file and what became of it, for each adapter
 * @throws TaskError when an id is taken; and as `packByAnswers`
 * @example
 * const tasks = await tasksByAnswers(createEngine(ort), "model.onnx", pack, { adapters: newcomers, encode: tokenizer });
 * for (const { id, file } of tasks) await pack.addTask(id, file);
 */
export async function tasksByAnswers(
  engine: Engine,
  model: ModelInput,
  pack: Pack,
  options: ByAnswersOptions,
): Promise<(AnsweringTask & { readonly file: Uint8Array<ArrayBuffer> })[]> {
  checkArgument("tasksByAnswers", engine, "an engine (createEngine(ort))", "load");
  checkPack("tasksByAnswers", pack);
  check("tasksByAnswers", options);
  const { adapters, names } = options;
  const projected = await projectAdapters(pack, adapters, await storedDtypes(pack));
  const added: string[] = [];
  try {
    for (const { entry, blob } of projected) {
      await pack.addTask(entry.id, encodeTaskFile(entry, pack.basisId, blob));
      added.push(entry.id);
    }
    const session = await createSession(engine, model, pack, { trainable: true, names });
    try {
      const answering = new Answering(options);
      await answering.plan({ pack, session });
      return await answering.all({ pack, session });
    } finally {
      await session.close();
    }
  } finally {
    for (const id of added) await pack.removeTask(id);
  }
}

/**
 * Packs adapters for a model, judged by answers.
 * @param engine runs the model: `createEngine` of a binding makes one
 * @param model path, URL, Blob or bytes of the ONNX model, or `{ encoder, decoder }`
 * @throws TypeError without texts where the tokenizer does not tell its words
 * @throws AdapterError, BaseMismatchError as `buildPack` and `createSession`
 * @example
 * const { chunks, report } = await packByAnswers(createEngine(ort), "model.onnx", { adapters, encode: tokenizer });
 */
export async function packByAnswers(
  engine: Engine,
  model: ModelInput,
  options: ByAnswersOptions,
): Promise<Built<ByAnswersReport>> {
  checkArgument("packByAnswers", engine, "an engine (createEngine(ort))", "load");
  check("packByAnswers", options);
  const making = new Making(engine, model, options);
  try {
    return await making.made();
  } finally {
    await making.close();
  }
}

/** @throws TypeError, RangeError */
function check(where: string, options: ByAnswersOptions): void {
  checkOptions(where, options, OPTIONS);
  checkAdapters(`${where}: adapters`, options.adapters);
  if (options.adapters.length === 0) throw new RangeError(`${where}: no adapters`);
  checkNumbers(where, options, { agreement: "between", minutes: "positive", steps: "count" });
  checkQuestions(options);
}

/** Packs of different sizes, one at a time. */
class Making {
  readonly #engine: Engine;
  readonly #model: ModelInput;
  readonly #options: ByAnswersOptions;
  readonly #answering: Answering;
  #level: Level | undefined;

  constructor(engine: Engine, model: ModelInput, options: ByAnswersOptions) {
    this.#engine = engine;
    this.#model = model;
    this.#options = options;
    this.#answering = new Answering(options);
  }

  async made(): Promise<Built<ByAnswersReport>> {
    const { adapters, base, anyBase, workers } = this.#options;
    const { size, expected } = await this.#chosen();
    const plain = await searchPack(adapters, { base, anyBase, workers });
    if (expected >= plain.report.bytes)
      return { ...plain, report: { ...plain.report, answers: [], steps: 0, stopped: this.#answering.late } };
    const level = await this.#open(size);
    // Trying tells better how long all will take.
    if (!this.#answering.late) await this.#answering.plan(level);
    const outcomes = await this.#answering.all(level);
    const places = await Promise.all(
      outcomes.map(({ file }) => {
        const { id, adapterBytes, metadata, brings, blob } = parseTaskFile(file, "a distilled task");
        return placeOf({ entry: { id, adapterBytes, metadata, brings }, blob });
      }),
    );
    const { bytes, chunks } = await freshPack(level.pack, places);
    const answers = outcomes.map(({ file, ...outcome }) => outcome);
    const ratio = level.report.adapterBytes / bytes;
    const stopped = outcomes.some(({ kept, reason }) => kept === "whole" && reason === undefined);
    return {
      chunks: await allOf(chunks),
      report: { ...level.report, bytes, ratio, answers, steps: this.#answering.steps, stopped },
    };
  }

  async close(): Promise<void> {
    await this.#level?.close();
    this.#level = undefined;
  }

  /** The size at which all tasks are expected to take least, from what becomes of some of them. */
  async #chosen(): Promise<{ readonly size: number; readonly expected: number }> {
    const { adapters } = this.#options;
    const sizes = adapters.length < FEW ? ERRORS.length : STEPS.length;
    const some = spread(adapters, TRIED);
    let at = adapters.length < FEW ? FIRST.alone : FIRST.shared;
    await this.#answering.plan(await this.#open(at), EXPECTED * some.length);
    const known = new Map<number, number>();
    const expected = async (size: number): Promise<number> => {
      if (!known.has(size)) known.set(size, await this.#expected(size, some));
      return known.get(size)!;
    };
    for (const direction of [-1, 1]) {
      const from = at;
      while (!this.#answering.late && at + direction >= 0 && at + direction < sizes) {
        // The pack of this size is open.
        const here = await expected(at);
        if ((await expected(at + direction)) >= here) break;
        at += direction;
      }
      // Smaller ones were better: larger ones are not.
      if (at !== from) break;
    }
    return { size: at, expected: await expected(at) };
  }

  /** Bytes of a pack of this size, once its tasks are as they will be. */
  async #expected(size: number, some: readonly Adapter[]): Promise<number> {
    const level = await this.#open(size);
    let grown = 0;
    for (const [i, adapter] of some.entries()) {
      this.#answering.tell("trying", adapter.id, i, some.length);
      const { bytes } = await this.#answering.tried(level, adapter);
      grown += bytes - level.pack.tasks.get(adapter.id)!.bytes;
    }
    return level.report.bytes + (grown / some.length) * this.#options.adapters.length;
  }

  /** The pack of a size, with a session. There is one at a time. */
  async #open(size: number): Promise<Level> {
    if (this.#level?.size === size) return this.#level;
    await this.close();
    const { adapters, base, anyBase, workers, names } = this.#options;
    const common = { base, anyBase, workers };
    const { chunks, report } =
      adapters.length < FEW
        ? await searchPack(adapters, { ...common, goal: { kind: "error", max: ERRORS[size]! } })
        : await buildPack(adapters, {
            ...{ ...common, gauge: "balanced", step: STEPS[size]!, select: { kind: "k", k: COMPONENTS } },
          });
    const pack = await openPack(new Blob(chunks as BlobPart[]));
    const session = await createSession(this.#engine, this.#model, pack, { trainable: true, names });
    const close = async (): Promise<void> => {
      await session.close();
      await pack.close();
    };
    this.#level = { size, pack, session, report, close };
    return this.#level;
  }
}
