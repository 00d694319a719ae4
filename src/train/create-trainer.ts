/**
 * Makes a trainer on a session. One copy of the weights learns and answers, in the session; the trainer holds only the numbers of the
 * task.
 */

import { checkChoice, checkList, checkOptions } from "../arguments.ts";
import type { Pack } from "../core/pack.ts";
import type { OnProgress } from "../progress.ts";
import type { Session } from "../session/session.ts";
import { type BatchFeeds, checkTokenizer, type Tokenizer } from "../session/tokens.ts";
import type { AbortOptions } from "../source.ts";
import { checkNumbers, checkSession } from "./checks.ts";
import { usualRank } from "./start.ts";
import { createBatcher, labelSupervision, type Supervision } from "./supervision.ts";
import type { SequenceOptions } from "./token-supervision.ts";
import { tokenSupervision } from "./token-supervision.ts";
import { headInputs, sessionModel } from "./trainable-model.ts";
import { sharedRows, type TrainedModule, TrainedTerms } from "./trained-terms.ts";
import { Trainer, type TrainerOptions } from "./trainer.ts";

/** Options of `createTrainer`. */
export interface CreateTrainerOptions extends TrainerOptions, SequenceOptions, AbortOptions {
  /**
   * Turns texts into the model's inputs, one row each: a tokenizer of transformers.js or @huggingface/tokenizers as it is, or a function.
   * Not needed for examples with feeds.
   */
  readonly encode?: Tokenizer | undefined;
  /**
   * "coefficients": over the pack's components. "lora": factors of every module, which begin as without a pack, or from its components
   * if `init` says so. Default: "coefficients".
   */
  readonly train?: "coefficients" | "lora" | undefined;
  /**
   * Rows of coefficients of each side, or rank of the factors. Default: as in the task to start from, or most of the pack's first tasks.
   */
  readonly rank?: number | undefined;
  /**
   * Rank-1 terms of each module beside the coefficients, for what the components lack. Default: as many as the task to start from has
   * in the module, else none.
   */
  readonly privateTerms?: number | undefined;
  /** Names of the modules to train. Default: those of the task to start from, else all of the pack. */
  readonly modules?: readonly string[] | undefined;
  /**
   * Layers to train whole, among those that the session was created to train: their names, or the name of a module that holds them.
   * `false`: none. Default: all. One of them has a row for each label.
   */
  readonly head?: string | readonly string[] | false | undefined;
  /** Told how far the pack's components are read, where they are not in memory. */
  readonly onProgress?: OnProgress | undefined;
}

/**
 * Makes a trainer on a session.
 * @param session created with `trainable: true`
 * @throws TypeError for a session that is not trainable, or an `encode` that cannot encode texts; RangeError for impossible labels, ranks, modules or heads
 * @example
 * const trainer = await createTrainer(session, { labels: ["spam", "fine"], encode: tokenizer });
 * for await (const { loss } of trainer.fit(examples)) console.log(loss);
 * await session.addTask("mine", await trainer.task());
 */
export async function createTrainer(session: Session, options: CreateTrainerOptions): Promise<Trainer<BatchFeeds>> {
  checkSession("createTrainer", session);
  checkOptions("createTrainer", options, [
    ...(["labels", "init", "seed", "encode", "train", "rank", "privateTerms", "modules", "head"] as const),
    ...(["end", "decoderStart", "signal", "onProgress"] as const),
  ]);
  if (options.labels !== undefined || !session.trainable!.graph.tokens)
    checkList("createTrainer: labels", options.labels!, 'names, such as ["spam", "fine"]');
  if (options.encode !== undefined) checkTokenizer("createTrainer: encode", options.encode);
  return makeTrainer(session, options, supervisionOf(session, options));
}

/** Chooses the supervision that fits the model's answers: labels of texts, or classes of tokens. */
export function supervisionOf(
  session: Session,
  { encode, labels = [], ...options }: Pick<CreateTrainerOptions, "encode" | "labels" | keyof SequenceOptions>,
): Supervision<BatchFeeds> {
  const { graph, example } = session.trainable!;
  const names = session.inputNames;
  if (!graph.tokens) {
    const short = [...(example ?? [])].flatMap(([name, { data }]) => (data instanceof Int32Array ? [name] : []));
    return labelSupervision(createBatcher(encode, names, new Set(short)), labels);
  }
  return tokenSupervision({ ...options, encode, names, example, labels, positions: graph.tokens.positions });
}

/** Makes a trainer with a supervision that may already hold encoded texts. */
export async function makeTrainer(
  session: Session,
  options: CreateTrainerOptions,
  supervision: Supervision<BatchFeeds>,
): Promise<Trainer<BatchFeeds>> {
  const { pack, trainable } = session;
  const source = trainable!;
  const { train = "coefficients", labels = [] } = options;
  checkChoice("train", train, ["coefficients", "lora"]);
  if (typeof options.init === "string") checkChoice("init", options.init, ["auto", "mean", "random", "fresh"]);
  checkNumbers("createTrainer", options, { rank: "whole", privateTerms: "count", decoderStart: "count" });
  // Language models have no head to train: their logits are over the vocabulary.
  const head = headInputs(source, labels.length === 0 ? false : options.head);
  const leftOut = new Set(session.leftOut);
  const here = pack.modules.flatMap(({ name }) => (leftOut.has(name) ? [] : [name]));
  const absent = options.modules?.find((name) => leftOut.has(name));
  if (absent !== undefined) throw new RangeError(`modules: "${absent}" was left out of this session`);
  const modules = await trainedModules(pack, options, here);
  const origin = new TrainedTerms(modules);
  const factors = modules.map(({ shared, privateRank, ...one }) => ({
    ...one,
    privateRank: privateRank + (shared?.rank ?? 0),
  }));
  const terms = train === "lora" ? new TrainedTerms(factors) : origin;
  const model = await sessionModel(source, terms, head, labels);
  return new Trainer({ pack, model, supervision, terms, origin, labels: [...labels] }, options);
}

/** Lists what is trained of each module, over the pack's components. @param here names of the modules that the session has */
async function trainedModules(
  pack: Pack,
  { modules, init, privateTerms, signal, onProgress, ...options }: CreateTrainerOptions,
  here: readonly string[],
): Promise<TrainedModule[]> {
  const { rank = await usualRank(pack) } = options;
  const unknown = modules?.find((name) => !pack.modules.some((module) => module.name === name));
  if (unknown !== undefined) throw new RangeError(`modules: the pack has no "${unknown}"`);
  const from =
    typeof init === "object" && pack.tasks.has(init.task) ? await pack.load(init.task, { signal }) : undefined;
  const first = options.rank === undefined ? from : undefined;
  const adapted = (from?.terms ?? []).map(({ module }) => pack.modules[module]!.name);
  const some = modules ?? (adapted.length > 0 ? here.filter((name) => adapted.includes(name)) : here);
  const section = await pack.bases({ signal, onProgress });
  try {
    return pack.modules.flatMap((module, index): TrainedModule[] => {
      const { name, in: inputs, out } = module;
      if (!some.includes(name)) return [];
      const own = first?.terms.find((term) => term.module === index);
      const shared = sharedRows(module, section.bytes, rank, own);
      const privateRank = privateTerms ?? own?.privateRank ?? 0;
      return [
        { name, in: inputs, out, shared, privateRank: shared ? privateRank : Math.max(privateRank, own ? 0 : rank) },
      ];
    });
  } finally {
    section.close();
  }
}
