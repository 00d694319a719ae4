/**
 * The smallest pack whose tasks still answer as their adapters do, with nothing asked of the user: components that all tasks share, each
 * task distilled onto them, its answers judged by questions that were held back. How coarse numbers may be is tried on a few tasks, and of a
 * language model whether tasks by themselves take less. A task that does not come close enough is stored closer to its adapter. Where
 * bytes are given, they decide how coarse numbers are. Input and seed decide all; a clock only where the caller sets `minutes`.
 */

import { type Adapter, checkAdapters, sharedModules } from "../adapters/adapter.ts";
import { checkArgument, checkOptions, checkPack } from "../arguments.ts";
import type { WeightHost } from "../core/base.ts";
import { renamedHost } from "../core/open-base.ts";
import { openPack, type Pack } from "../core/pack.ts";
import { parseTaskFile } from "../core/task-file.ts";
import { AdapterError, BaseMismatchError } from "../errors.ts";
import { encodeTaskFile, placeOf } from "../format/encode.ts";
import { onnxHost } from "../onnx/host.ts";
import { readModel } from "../onnx/read.ts";
import { projectAdapters, storedDtypes } from "../pack/add.ts";
import { type Built, readFingerprints } from "../pack/build.ts";
import type { BuildReport } from "../pack/report.ts";
import { searchPack, spread } from "../pack/search.ts";
import { Unreachable } from "../pack/seek.ts";
import { allOf, freshPack } from "../pack/write.ts";
import type { Engine } from "../session/engine.ts";
import { createSession } from "../session/session.ts";
import type { SourceInput } from "../source.ts";
import {
  Answering,
  type AnsweringTask,
  type ByAnswersOptions,
  kindsOf,
  type Open,
  type Outcome,
  type SizedPacks,
} from "./answering.ts";
import { templateOf } from "./questions.ts";
import { checkQuestions } from "./teacher.ts";
import { checkNumbers } from "./trainable-model.ts";

/** Report of `packByAnswers`. What it says of ΔW and terms is from before tasks were distilled. */
export interface ByAnswersReport extends BuildReport {
  /** Empty where tasks would take no fewer bytes than in a pack without a model, which it is then. */
  readonly answers: readonly AnsweringTask[];
  /** Most training steps of a task. */
  readonly steps: number;
  /** Ids of tasks that were stored as without a model, since `signal` or `minutes` left them no turn. */
  readonly left: readonly string[];
}

/** Which pack of a kind. */
interface Sized {
  readonly kind: SizedPacks;
  readonly at: number;
}

/** A pack that was made for some size. */
interface Level extends Open, Sized {
  readonly report: BuildReport;
  readonly close: () => Promise<void>;
}

const OPTIONS = [
  ...(["adapters", "encode", "texts", "examples", "end", "decoderStart", "names", "base", "anyBase"] as const),
  ...(["agreement", "bytes", "minutes", "steps", "seed", "signal", "onProgress", "finished", "workers"] as const),
] as const;

/** A pack that exists has its size. */
const TASK_OPTIONS = OPTIONS.filter((name) => name !== "bytes");

/** Sizes that are expected to be tried. */
const EXPECTED = 3;
/**
 * Tasks that sizes are tried on. Of 20 tasks of own-seed nine were stored closer where one of six was expected, for 141 kB instead of 103.
 * Steps of tokens take far longer.
 */
const TRIED = { labels: 16, tokens: 6 };

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
  model: SourceInput,
  pack: Pack,
  options: ByAnswersOptions,
): Promise<(AnsweringTask & { readonly file: Uint8Array<ArrayBuffer> })[]> {
  checkArgument("tasksByAnswers", engine, "an engine (createEngine(ort))", "load");
  checkPack("tasksByAnswers", pack);
  check("tasksByAnswers", options, TASK_OPTIONS);
  const { adapters, names } = options;
  const projected = await projectAdapters(pack, adapters, await storedDtypes(pack), { maxLoss: 1 });
  const added: string[] = [];
  try {
    for (const { entry, blob } of projected) {
      await pack.addTask(entry.id, encodeTaskFile(entry, pack.basisId, blob));
      added.push(entry.id);
    }
    const session = await createSession(engine, model, pack, { trainable: true, names });
    try {
      return await new Answering(options).all({ pack, session });
    } finally {
      await session.close();
    }
  } finally {
    for (const id of added) await pack.removeTask(id);
  }
}

/**
 * Packs adapters for a model, judged by answers. Without `base`, fingerprints are of the model, where its weights are floats under the
 * adapters' names.
 * @param engine runs the model: `createEngine` of a binding makes one
 * @param model path, URL, Blob or bytes of the ONNX model
 * @throws RangeError for fewer `bytes` than any such pack takes, with the least
 * @throws TypeError without texts where the tokenizer does not tell its words
 * @throws AdapterError, BaseMismatchError as `buildPack` and `createSession`
 * @example
 * const { chunks, report } = await packByAnswers(createEngine(ort), "model.onnx", { adapters, encode: tokenizer });
 */
export async function packByAnswers(
  engine: Engine,
  model: SourceInput,
  options: ByAnswersOptions,
): Promise<Built<ByAnswersReport>> {
  checkArgument("packByAnswers", engine, "an engine (createEngine(ort))", "load");
  check("packByAnswers", options, OPTIONS);
  const own = options.base === undefined ? await modelBase(model, options.adapters, options.names) : undefined;
  const making = new Making(engine, model, own ? { ...options, base: own } : options);
  try {
    return await making.made();
  } finally {
    await making.close();
    await own?.close?.();
  }
}

/** @throws TypeError, RangeError */
function check(where: string, options: ByAnswersOptions, known: readonly (keyof ByAnswersOptions)[]): void {
  checkOptions(where, options, known);
  checkAdapters(`${where}: adapters`, options.adapters);
  if (options.adapters.length === 0) throw new RangeError(`${where}: no adapters`);
  for (const { file, modules } of options.adapters) {
    const untrained = [...modules.values()].find(({ layout }) => layout === "conv" || layout === "embedding");
    if (!untrained) continue;
    const message = `"${untrained.name}" has the layout "${untrained.layout}", which cannot be trained: pack without a model`;
    throw new AdapterError(message, { file, field: untrained.name });
  }
  checkNumbers(where, options, { agreement: "between", bytes: "positive", minutes: "positive", steps: "count" });
  if (options.bytes !== undefined && options.agreement !== undefined)
    throw new RangeError(`${where}: agreement or bytes: give one of them`);
  checkQuestions(options);
}

/** Packs of different sizes, one at a time. */
class Making {
  readonly #engine: Engine;
  readonly #model: SourceInput;
  readonly #options: ByAnswersOptions;
  readonly #answering: Answering;
  readonly #kinds: readonly SizedPacks[];
  #level: Level | undefined;
  /** Sizes that were tried. */
  #sizes = 0;
  /** Says which templates ask nothing, where questions are made. */
  #unused: readonly string[] = [];

  constructor(engine: Engine, model: SourceInput, options: ByAnswersOptions) {
    this.#engine = engine;
    this.#model = model;
    this.#options = options;
    this.#answering = new Answering(options);
    const { adapters, base, anyBase, workers } = options;
    this.#kinds = kindsOf(adapters, { base, anyBase, workers });
  }

  async made(): Promise<Built<ByAnswersReport>> {
    const { adapters, bytes: most, base, anyBase, workers } = this.#options;
    const { sized, expected } = await (most === undefined ? this.#smallest() : this.#within(most));
    this.#unused = this.#unusedTemplates(this.#level!);
    const plain = most === undefined ? await searchPack(adapters, { base, anyBase, workers }) : undefined;
    if (plain && expected >= plain.report.bytes) return this.#undistilled(plain);
    const level = await this.#open(sized);
    const outcomes = await this.#answering.all(level);
    let made = await this.#packed(level, outcomes);
    while (most !== undefined && made.report.bytes > most) {
      // The task that has grown most is stored as it was.
      const grown = outcomes.map(({ id, bytes }) => bytes - level.pack.tasks.get(id)!.bytes);
      const i = grown.indexOf(Math.max(...grown));
      if (grown[i]! <= 0) throw tooFew(most, made.report.bytes);
      outcomes[i] = await this.#answering.projected(level, adapters[i]!);
      made = await this.#packed(level, outcomes);
    }
    // Tasks may take more than some of them promised.
    return plain && made.report.bytes >= plain.report.bytes ? this.#undistilled(plain, made.report.left) : made;
  }

  /** A pack without a model, which takes no more. */
  #undistilled({ chunks, report }: Built<BuildReport>, left = this.#unturned): Built<ByAnswersReport> {
    const warnings = [...report.warnings, ...this.#unused, ...this.#answering.refused];
    return { chunks, report: { ...report, warnings, answers: [], steps: 0, left } };
  }

  async #packed(level: Level, outcomes: readonly Outcome[]): Promise<Built<ByAnswersReport>> {
    const places = await Promise.all(
      outcomes.map(({ file }) => {
        const { id, adapterBytes, metadata, brings, blob } = parseTaskFile(file, "a distilled task");
        return placeOf({ entry: { id, adapterBytes, metadata, brings }, blob });
      }),
    );
    const { bytes, chunks } = await freshPack(level.pack, places);
    const answers = outcomes.map(({ file, ...outcome }) => outcome);
    const ratio = level.report.adapterBytes / bytes;
    const left = outcomes.flatMap(({ id, kept, reason }) => (kept === "undistilled" && !reason ? [id] : []));
    const steps = this.#answering.stepsOf(level);
    const warnings = [...level.report.warnings, ...this.#unused];
    return {
      chunks: await allOf(chunks),
      report: { ...level.report, bytes, ratio, warnings, answers, steps, left },
    };
  }

  /** Ids of all adapters, where time is over. */
  get #unturned(): readonly string[] {
    return this.#answering.late ? this.#options.adapters.map(({ id }) => id) : [];
  }

  #unusedTemplates(level: Level): string[] {
    const { adapters, texts, examples } = this.#options;
    if (texts || examples || !this.#answering.asksTokens(level)) return [];
    const unused = adapters.filter(({ metadata }) => metadata["template"] !== undefined && !templateOf(metadata));
    return unused.map(({ id }) => `${id}: its template has no "{input}", so it was asked lines of words`);
  }

  async close(): Promise<void> {
    await this.#level?.close();
    this.#level = undefined;
  }

  /** The pack in which all tasks are expected to take least, from what becomes of some of them. */
  async #smallest(): Promise<{ readonly sized: Sized; readonly expected: number }> {
    const [kind, ...others] = this.#kinds;
    let best: Sized = { kind: kind!, at: kind!.first };
    const level = await this.#open(best);
    // Components gain labels most at every size that was measured, and tokens little (docs/research/size.md).
    const rivals = this.#answering.asksTokens(level) ? others : [];
    let least = (await this.#tried(best)).bytes;
    const isLess = async (one: Sized): Promise<boolean> => {
      const { bytes } = await this.#tried(one);
      if (bytes >= least) return false;
      [best, least] = [one, bytes];
      return true;
    };
    for (const other of rivals) {
      // One in which all tasks agree takes no more than its bytes.
      if (!this.#answering.late) await isLess({ kind: other, at: await other.largest(least) });
    }
    for (const direction of [-1, 1]) {
      const from = best.at;
      while (!this.#answering.late && best.at + direction >= 0 && best.at + direction <= best.kind.last)
        if (!(await isLess({ ...best, at: best.at + direction }))) break;
      // Smaller ones were better: larger ones are not.
      if (best.at !== from) break;
    }
    return { sized: best, expected: least };
  }

  /** The finest pack that the bytes allow, in the kind in which a few tasks agree most. */
  async #within(most: number): Promise<{ readonly sized: Sized; readonly expected: number }> {
    let best: { sized: Sized; expected: number; agreement: number } | undefined;
    for (const kind of this.#kinds) {
      const at = await kind.within(most);
      if (at === undefined) continue;
      const { bytes, agreement } = await this.#tried({ kind, at });
      if (best && agreement <= best.agreement) continue;
      // Tasks take more when they are distilled.
      const grown = bytes / (await kind.bytes(at));
      best = { sized: { kind, at: (await kind.within(most / grown)) ?? 0 }, expected: most, agreement };
    }
    if (best) return best;
    throw tooFew(most, Math.min(...(await Promise.all(this.#kinds.map((kind) => kind.bytes(0))))));
  }

  /** Bytes of a pack, once its tasks are as they will be, and how far they agree; from some of them. */
  async #tried(sized: Sized): Promise<{ readonly bytes: number; readonly agreement: number }> {
    const level = await this.#open(sized);
    const some = spread(this.#options.adapters, TRIED[this.#answering.asksTokens(level) ? "tokens" : "labels"]);
    let [grown, agreed] = [0, 0];
    const expected = this.#options.bytes === undefined ? EXPECTED : this.#kinds.length;
    for (const { id, bytes, agreement = 0 } of await this.#answering.tried(level, some, this.#sizes++, expected)) {
      grown += bytes - level.pack.tasks.get(id)!.bytes;
      agreed += agreement;
    }
    const bytes = level.report.bytes + (grown / some.length) * this.#options.adapters.length;
    return { bytes, agreement: agreed / some.length };
  }

  /** A pack with a session. There is one at a time. */
  async #open(sized: Sized): Promise<Level> {
    if (this.#level?.kind === sized.kind && this.#level.at === sized.at) return this.#level;
    await this.close();
    const { chunks, report } = await sized.kind.make(sized.at);
    const pack = await openPack(new Blob(chunks as BlobPart[]));
    const session = await createSession(this.#engine, this.#model, pack, {
      trainable: true,
      names: this.#options.names,
    });
    const close = async (): Promise<void> => {
      await session.close();
      await pack.close();
    };
    this.#level = { ...sized, pack, session, report, close };
    return this.#level;
  }
}

// The model that a pack is made with as its base: apps recognise it by fingerprints of its weights.

/**
 * The weights of a model; undefined where they are not all in it in floats, under the names that the adapters have for them.
 * @param names of weights, by module name
 * @throws FormatError, SourceError where it cannot be read; AdapterError for adapters that do not agree about a module
 */
export async function modelBase(
  model: SourceInput,
  adapters: readonly Adapter[],
  names: ReadonlyMap<string, string> = new Map(),
): Promise<WeightHost | undefined> {
  const shapes = [...sharedModules(adapters).values()].map(({ shape }) => shape);
  const whole = onnxHost(await readModel(model, { weightsApart: true }));
  try {
    const host = names.size > 0 ? renamedHost(whole, names) : whole;
    await readFingerprints(host, shapes);
    return host;
  } catch (error) {
    await whole.close!();
    if (error instanceof BaseMismatchError) return undefined;
    throw error;
  }
}

function tooFew(max: number, least: number): Unreachable {
  return new Unreachable(`${max} bytes are too few: the least is ${least}`, least);
}
