/**
 * Distilling as the last step of `pack`: of everything that answers were asked about, the best pack whose tasks are coefficients is
 * distilled, and taken where its answers are then closer to the adapters' than those of the pack that was chosen.
 */
import type { Adapter } from "../adapters/adapter.ts";
import { parseTaskFile } from "../format/task-file.ts";
import type { Built } from "../pack/build.ts";
import { freshPack, tasksOf } from "../pack/fresh.ts";
import type { Judge, Tried } from "../pack/goal.ts";
import { openPack } from "../pack/pack.ts";
import { type SearchOptions, type SearchReport, searchPack } from "../pack/search.ts";
import type { Engine } from "../session/engine.ts";
import { createSession } from "../session/session.ts";
import { distill } from "../train/distill.ts";
import type { JudgeOptions } from "../train/judge.ts";
import type { Output } from "./output.ts";

/** What answers are asked of, and how. */
export interface Asked {
  readonly engine: Engine;
  readonly model: string;
  readonly options: JudgeOptions;
  readonly judge: Judge;
}

/**
 * @param chosen what a search with these options has found
 * @param steps for each task
 */
export async function distilled(
  adapters: readonly Adapter[],
  chosen: Built<SearchReport>,
  search: SearchOptions,
  { engine, model, options, judge }: Asked,
  steps: number,
  out: Output,
): Promise<Built<SearchReport>> {
  const { report } = chosen;
  const best = report.tried
    .filter(({ way, divergence }) => divergence !== undefined && way.allocateBeside === undefined)
    .sort((a, b) => a.divergence! - b.divergence!)[0];
  if (!best) return chosen;
  const { chunks, report: plain } = await again(adapters, best, search);
  const pack = await openPack(new Blob(chunks as BlobPart[]));
  const session = await createSession(engine, model, pack, { trainable: true, names: options.names });
  const blobs = new Map<string, Uint8Array>();
  try {
    const { texts, encode } = options;
    for (const [i, adapter] of adapters.entries()) {
      const onStep = ({ step }: { step: number }): void =>
        out.progress("step", i * steps + step, adapters.length * steps, `distilling ${adapter.id}`);
      const { id, file } = await distill(session, { adapter, texts, encode, steps, onStep });
      blobs.set(id, parseTaskFile(file, `task "${id}"`).blob);
    }
    const made: Uint8Array[] = [];
    for await (const chunk of (await freshPack(pack, await tasksOf(pack, blobs))).chunks) made.push(chunk);
    return await better(chosen, { chunks: made, report: { ...report, ...plain } }, best, judge);
  } finally {
    await session.close();
    await pack.close();
  }
}

/** The pack of one way, made again. */
async function again(
  adapters: readonly Adapter[],
  { way, bytes }: Tried,
  { goal, ...options }: SearchOptions,
): Promise<Built<SearchReport>> {
  const { judge: _, onTry: __, moments: ___, ...plain } = options;
  const max = goal?.kind === "bytes" ? goal.max : bytes!;
  return searchPack(adapters, { ...plain, goal: { kind: "bytes", max }, ways: [way] });
}

async function better(
  chosen: Built<SearchReport>,
  made: Built<SearchReport>,
  { name, divergence: before }: Tried,
  judge: Judge,
): Promise<Built<SearchReport>> {
  const pack = await openPack(new Blob(made.chunks as BlobPart[]));
  const found = await judge(pack, [...pack.tasks.keys()]);
  await pack.close();
  const divergence = typeof found === "number" ? found : NaN;
  const won = divergence < chosen.report.divergence!;
  const decision =
    `distilling "${name}" took its mean KL from ${before!.toFixed(4)} to ${divergence.toFixed(4)}: ` +
    (won ? "it is taken" : `"${chosen.report.name}" stays`);
  const { report, chunks } = won ? made : chosen;
  const bytes = chunks.reduce((sum, { length }) => sum + length, 0);
  return {
    chunks,
    report: {
      ...report,
      bytes,
      decisions: [...chosen.report.decisions, decision],
      ...(won ? { name, divergence } : {}),
    },
  };
}
