/**
 * `eigenlora/learn`: a new task on the model of an onnxruntime session, by training coefficients only. The session learns and
 * answers with one copy of the weights; the trainer holds numbers.
 */

import type { Session } from "../session/session.ts";
import type { BatchFeeds } from "./batch.ts";
import { createMachine, headInputs } from "./machine.ts";
import { usualRank } from "./start.ts";
import { basesOf, Terms, type TrainedModule } from "./terms.ts";
import { Trainer, type TrainerOptions } from "./trainer.ts";

export type { BatchFeeds } from "./batch.ts";
export type { Example } from "./examples.ts";
export type { Start } from "./start.ts";
export { type FitOptions, Trainer, type TrainerOptions, type TrainingStep } from "./trainer.ts";
export { type ZeroShotOptions, zeroShotTask } from "./zero-shot.ts";

export interface CreateTrainerOptions extends TrainerOptions {
  /** Texts as the model's inputs, one row each: a tokenizer. Examples with feeds of their own do without. */
  readonly encode?: ((texts: string[]) => BatchFeeds | Promise<BatchFeeds>) | undefined;
  /**
   * "coefficients" over the pack's components, unless given; "components": these too, for a pack of its own; "lora": factors of
   * every module, which begin as without a pack, or from its components where `init` says so.
   */
  readonly train?: "coefficients" | "components" | "lora" | undefined;
  /** Rows of coefficients of each side, or rank of the factors; as the task to start from, or most of the pack's first tasks, unless given. */
  readonly rank?: number | undefined;
  /** Free rank-1 terms of each module beside the coefficients, for what the components lack; 0 unless given. */
  readonly privateTerms?: number | undefined;
  /** The modules that are trained; all of the pack unless given. */
  readonly modules?: readonly string[] | undefined;
  /** The layer that is trained whole, one that the session was made to train; the only one unless given. `false`: none. */
  readonly head?: string | false | undefined;
}

/**
 * Makes a trainer on a session.
 * @param session made with `trainable: true`
 * @throws TypeError for a session that is not trainable; RangeError for labels, ranks, modules or heads that cannot be
 * @example
 * const trainer = await createTrainer(session, { labels: ["spam", "fine"], encode: (texts) => tokenizer(texts) });
 * for await (const { loss } of trainer.fit(examples)) console.log(loss);
 * await session.addTask("mine", await trainer.task());
 */
export async function createTrainer(session: Session, options: CreateTrainerOptions): Promise<Trainer<BatchFeeds>> {
  const source = session.trainable;
  if (!source) throw new TypeError("createTrainer: this session cannot be trained; create it with trainable: true");
  const { pack } = session;
  const { train = "coefficients", rank = await usualRank(pack), privateTerms = 0, init } = options;
  if (!["coefficients", "components", "lora"].includes(train)) {
    throw new RangeError(`train: expected "coefficients", "components" or "lora", got ${JSON.stringify(train)}`);
  }
  if (!(Number.isInteger(rank) && rank >= 1)) throw new RangeError(`rank: expected a whole number ≥ 1, got ${rank}`);
  if (!(Number.isInteger(privateTerms) && privateTerms >= 0))
    throw new RangeError(`privateTerms: expected a whole number ≥ 0, got ${privateTerms}`);
  const unknown = options.modules?.find((name) => !pack.modules.some((module) => module.name === name));
  if (unknown !== undefined) throw new RangeError(`modules: the pack has no "${unknown}"`);
  const flat = pack.modules.find(({ A, B }) => A?.kind === "flat" || B?.kind === "flat");
  if (train === "components" && flat)
    throw new RangeError(`train: the components of "${flat.name}" are flat, only those of column mode are trained`);
  const head = headInputs(source, options.head);
  const bases = await pack.bases();
  const first =
    typeof init === "object" && options.rank === undefined && pack.tasks.has(init.task)
      ? await pack.load(init.task)
      : undefined;
  const modules = pack.modules.flatMap((module, index): TrainedModule[] => {
    const { name, in: inputs, out } = module;
    if (options.modules?.includes(name) === false) return [];
    const components = basesOf(module, bases.bytes);
    const own = first?.terms.find((term) => term.module === index && term.A);
    // Flat components are of one rank.
    const shared = components && {
      ...components,
      rank: module.A!.rank ?? own?.rank ?? rank,
      trained: train === "components",
    };
    return [{ name, in: inputs, out, shared, privateRank: shared ? privateTerms : Math.max(privateTerms, rank) }];
  });
  bases.close();
  const origin = new Terms(modules);
  const factors = modules.map((one) => ({
    ...one,
    shared: undefined,
    privateRank: Math.max(one.privateRank, one.shared?.rank ?? 0),
  }));
  const trained = train === "lora" ? new Terms(factors) : origin;
  const machine = await createMachine(source, trained, head, options);
  return new Trainer({ pack, machine, terms: trained, origin }, options);
}
