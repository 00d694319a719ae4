/**
 * Tasks that nobody has trained (the paper's zero-shot): coefficients that are the mean of those that the pack's tasks have, or
 * random ones of their spread. They say how much of what the tasks do is common to them, and are a start for a head that is
 * trained alone.
 */

import { TaskError } from "../errors.ts";
import type { TaskMetadata } from "../format/format.ts";
import type { Pack } from "../pack/pack.ts";
import type { Dtype } from "../tensor/dtypes.ts";
import { uniform } from "../tensor/random.ts";
import { taskFile } from "./result.ts";
import { Donors, usualRank } from "./start.ts";
import { basesOf, Terms } from "./terms.ts";

export interface ZeroShotOptions {
  /** "mean" is for tasks trained from one seed, whose rows correspond; "random" for others. "mean" unless given. */
  readonly from?: "mean" | "random" | undefined;
  /** 0 unless given. */
  readonly seed?: number | undefined;
  /** In the file; `addTask` may give another. */
  readonly id?: string | undefined;
  /** Rows of coefficients; that of most of the pack's first tasks unless given. Flat components have one of their own. */
  readonly rank?: number | undefined;
  /** Of the coefficients; f16 unless given. */
  readonly dtype?: Dtype | undefined;
  readonly metadata?: TaskMetadata | undefined;
}

/**
 * Makes a task of the coefficients that the tasks of a pack have, as a task file. It brings no head: the base's stays.
 * @throws TaskError when the pack has no tasks, or no components
 * @throws RangeError for a rank that cannot be
 * @example
 * await session.addTask("mean", await zeroShotTask(session.pack));
 */
export async function zeroShotTask(pack: Pack, options: ZeroShotOptions = {}): Promise<Uint8Array<ArrayBuffer>> {
  const { from = "mean", seed = 0, id = "zero-shot", dtype = "f16", metadata = {} } = options;
  const rank = options.rank ?? (await usualRank(pack));
  if (!(Number.isInteger(rank) && rank >= 1)) throw new RangeError(`rank: expected a whole number ≥ 1, got ${rank}`);
  if (from !== "mean" && from !== "random")
    throw new RangeError(`from: expected "mean" or "random", got ${JSON.stringify(from)}`);
  const bases = await pack.bases();
  const modules = pack.modules.flatMap((module) => {
    const components = basesOf(module, bases.bytes);
    const { name, in: inputs, out, A } = module;
    return components
      ? [{ name, in: inputs, out, privateRank: 0, shared: { ...components, rank: A!.rank ?? rank, trained: false } }]
      : [];
  });
  bases.close();
  if (pack.tasks.size === 0 || modules.length === 0) {
    throw new TaskError(
      `${pack.name} has no ${modules.length === 0 ? "components" : "tasks"} to make coefficients of`,
      { task: id },
    );
  }
  const terms = new Terms(modules);
  const parameters = new Float32Array(terms.size);
  (await Donors.of(pack, terms)).fill(from, parameters, uniform(seed));
  return taskFile(pack, id, { parameters, terms, head: undefined }, { coefficients: dtype, head: dtype }, metadata);
}
