/**
 * A trainer on the model of an onnxruntime session. The session learns and answers with one copy of the weights; the trainer holds
 * numbers.
 */

import { checkChoice, checkList, checkOptions } from "../arguments.ts";
import type { Pack } from "../core/pack.ts";
import { type PackModule, type Side, sharedBases } from "../format/format.ts";
import type { Session } from "../session/session.ts";
import type { BatchFeeds } from "./batch.ts";
import { createInputs, type Encode } from "./inputs.ts";
import { labelledLessons } from "./labelled.ts";
import type { Lessons } from "./lessons.ts";
import { checkNumbers, checkSession } from "./limits.ts";
import { createMachine, headInputs } from "./machine.ts";
import type { SequenceOptions } from "./sequences.ts";
import { usualRank } from "./start.ts";
import { sharedRows, Terms, type TrainedModule } from "./terms.ts";
import { tokenLessons } from "./tokens.ts";
import { Trainer, type TrainerOptions } from "./trainer.ts";

/** Options of `createTrainer`. */
export interface CreateTrainerOptions extends TrainerOptions, SequenceOptions {
  /** Texts as the model's inputs, one row each: a tokenizer of transformers.js, as it is. Examples with feeds of their own do without. */
  readonly encode?: Encode | undefined;
  /**
   * "coefficients" over the pack's components; "components": these too, for a pack of its own; "lora": factors of every module, which
   * begin as without a pack, or from its components where `init` says so. Default: "coefficients".
   */
  readonly train?: "coefficients" | "components" | "lora" | undefined;
  /** Rows of coefficients of each side, or rank of the factors. Default: that of the task to start from, or most of the pack's first tasks. */
  readonly rank?: number | undefined;
  /**
   * Rank-1 terms of each module beside the coefficients, for what the components lack. Default: as many as the task to start from has
   * there, or none.
   */
  readonly privateTerms?: number | undefined;
  /** Names of the modules that are trained. Default: all of the pack. */
  readonly modules?: readonly string[] | undefined;
  /**
   * The layers that are trained whole, of those that the session was made to train: their names, or that of a module that holds them;
   * `false`: none. Default: all, one of which has a row for each label.
   */
  readonly head?: string | readonly string[] | false | undefined;
}

/**
 * Makes a trainer on a session.
 * @param session made with `trainable: true`
 * @throws TypeError for a session that is not trainable; RangeError for labels, ranks, modules or heads that cannot be
 * @example
 * const trainer = await createTrainer(session, { labels: ["spam", "fine"], encode: tokenizer });
 * for await (const { loss } of trainer.fit(examples)) console.log(loss);
 * await session.addTask("mine", await trainer.task());
 */
export async function createTrainer(session: Session, options: CreateTrainerOptions): Promise<Trainer<BatchFeeds>> {
  checkSession("createTrainer", session);
  checkOptions("createTrainer", options, [
    ...(["labels", "init", "seed", "encode", "train", "rank", "privateTerms", "modules", "head"] as const),
    ...(["end", "decoderStart"] as const),
  ]);
  if (options.labels !== undefined || !session.trainable!.graph.tokens)
    checkList("createTrainer: labels", options.labels!, 'names, such as ["spam", "fine"]');
  return makeTrainer(session, options, lessonsOf(session, options));
}

/** What a model's answers can be taught by. */
export function lessonsOf(
  session: Session,
  { encode, labels = [], ...options }: Pick<CreateTrainerOptions, "encode" | "labels" | keyof SequenceOptions>,
): Lessons<BatchFeeds> {
  const { graph, example } = session.trainable!;
  const names = session.inputNames;
  if (!graph.tokens) return labelledLessons(createInputs(encode, names), labels);
  return tokenLessons({ ...options, encode, names, example, labels, positions: graph.tokens.positions });
}

/** The same with lessons that may have encoded texts before. */
export async function makeTrainer(
  session: Session,
  options: CreateTrainerOptions,
  lessons: Lessons<BatchFeeds>,
): Promise<Trainer<BatchFeeds>> {
  const { pack, trainable } = session;
  const source = trainable!;
  const { train = "coefficients", labels = [] } = options;
  checkChoice("train", train, ["coefficients", "components", "lora"]);
  checkNumbers("createTrainer", options, { rank: "whole", privateTerms: "count", decoderStart: "count" });
  // A vocabulary is no head of a task.
  const head = headInputs(source, labels.length === 0 ? false : options.head);
  const leftOut = new Set(session.leftOut);
  const here = pack.modules.flatMap(({ name }) => (leftOut.has(name) ? [] : [name]));
  const absent = options.modules?.find((name) => leftOut.has(name));
  if (absent !== undefined) throw new RangeError(`modules: "${absent}" was left out of this session`);
  const modules = await trainedModules(pack, { ...options, modules: options.modules ?? here }, train === "components");
  const origin = new Terms(modules);
  const factors = modules.map(({ shared, privateRank, ...one }) => ({
    ...one,
    privateRank: Math.max(privateRank, shared?.rank ?? 0),
  }));
  const terms = train === "lora" ? new Terms(factors) : origin;
  const machine = await createMachine(source, terms, head, labels);
  return new Trainer({ pack, machine, lessons, terms, origin, labels: [...labels] }, options);
}

/** What is trained of each module, over the pack's components. */
async function trainedModules(
  pack: Pack,
  { modules, init, privateTerms, ...options }: CreateTrainerOptions,
  components: boolean,
): Promise<TrainedModule[]> {
  const { rank = await usualRank(pack) } = options;
  const unknown = modules?.find((name) => !pack.modules.some((module) => module.name === name));
  if (unknown !== undefined) throw new RangeError(`modules: the pack has no "${unknown}"`);
  const bases = ({ A, B }: PackModule): Side[] => [...A, ...B];
  const flat = pack.modules.find((module) => bases(module).some(({ kind }) => kind === "flat"));
  const apart = pack.modules.find((module) => bases(module).length > 0 && !sharedBases(module));
  if (components && apart)
    throw new RangeError(`train: the tasks do not share all components of "${apart.name}", so they cannot be trained`);
  if (components && flat)
    throw new RangeError(`train: the components of "${flat.name}" are flat, only those of column mode are trained`);
  const follows = typeof init === "object" && options.rank === undefined && pack.tasks.has(init.task);
  const first = follows ? await pack.load(init.task) : undefined;
  const section = await pack.bases();
  try {
    return pack.modules.flatMap((module, index): TrainedModule[] => {
      const { name, in: inputs, out } = module;
      if (modules?.includes(name) === false) return [];
      const own = first?.terms.find((term) => term.module === index);
      const made = own?.A !== undefined;
      const shared = sharedRows(module, section.bytes, made ? own.rank : rank, components, made);
      const privateRank = privateTerms ?? own?.privateRank ?? 0;
      return [
        { name, in: inputs, out, shared, privateRank: shared ? privateRank : Math.max(privateRank, own ? 0 : rank) },
      ];
    });
  } finally {
    section.close();
  }
}
