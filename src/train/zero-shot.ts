/**
 * Tasks without training (the paper's zero-shot). Their coefficients are the mean of those of the pack's tasks, or random ones with their
 * spread. They show how much the tasks have in common, and are a start for a head that is trained alone.
 */

import { checkChoice, checkOptions, checkPack } from "../arguments.ts";
import type { Pack } from "../core/pack.ts";
import { TaskError } from "../errors.ts";
import { uniform } from "../tensor/random.ts";
import { checkNumbers } from "./checks.ts";
import { fillStart, usualRank } from "./start.ts";
import { learnedTask, type TaskFileOptions, taskFile } from "./stored-task.ts";
import { sharedRows, type TrainedModule, TrainedTerms } from "./trained-terms.ts";

/** Options of `zeroShotTask`. */
export interface ZeroShotOptions extends TaskFileOptions {
  /** "mean" suits tasks trained from one seed, whose rows correspond; "random" suits others. Default: "mean". */
  readonly init?: "mean" | "random" | undefined;
  /** Default: 0. */
  readonly seed?: number | undefined;
  /** Rows of coefficients. Default: the rank of most of the pack's first tasks. Flat components have a rank of their own. */
  readonly rank?: number | undefined;
}

/**
 * Makes a task file from the coefficients of a pack's tasks. It brings no head: the base's stays.
 * @throws TaskError when the pack has no tasks, or no components
 * @throws RangeError for a rank that cannot be
 * @example
 * await session.addTask("mean", await zeroShotTask(session.pack));
 */
export async function zeroShotTask(pack: Pack, options: ZeroShotOptions = {}): Promise<Uint8Array<ArrayBuffer>> {
  const { init = "mean", seed = 0, id = "zero-shot" } = options;
  checkPack("zeroShotTask", pack);
  checkOptions("zeroShotTask", options, ["init", "seed", "rank", "id", "dtype", "metadata"]);
  checkNumbers("zeroShotTask", options, { rank: "whole" });
  checkChoice("init", init, ["mean", "random"]);
  const rank = options.rank ?? (await usualRank(pack));
  const bases = await pack.bases();
  let modules: TrainedModule[];
  try {
    modules = pack.modules.flatMap((module) => {
      const shared = sharedRows(module, bases.bytes, rank, false);
      return shared ? [{ name: module.name, in: module.in, out: module.out, privateRank: 0, shared }] : [];
    });
  } finally {
    bases.close();
  }
  if (pack.tasks.size === 0 || modules.length === 0) {
    const lacking = modules.length === 0 ? "components" : "tasks";
    throw new TaskError(`${pack.name} has no ${lacking} to make coefficients of`, { task: id });
  }
  const terms = new TrainedTerms(modules);
  const parameters = new Float32Array(terms.size);
  await fillStart(pack, terms, init, parameters, uniform(seed));
  const none = new Float32Array(0);
  return taskFile(pack, learnedTask(pack, terms, { parameters, weight: none, bias: none }, [], { ...options, id }));
}
