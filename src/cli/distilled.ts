/**
 * Distilling as the last step of `pack`: of everything that answers were asked about, the best pack that can be distilled is, and is
 * taken where its answers are then closer to the adapters' than those of the pack that was chosen.
 */

import { openPack } from "../core/open-pack.ts";
import type { Pack } from "../core/pack.ts";
import { parseTaskFile } from "../core/task-file.ts";
import type { ModelInput } from "../onnx/whole.ts";
import type { Built } from "../pack/build.ts";
import type { SearchOptions } from "../pack/goal.ts";
import { type SearchReport, searchPack } from "../pack/search.ts";
import type { Way } from "../pack/ways.ts";
import { freshPack, tasksOf } from "../pack/write.ts";
import { createSession } from "../session/create-session.ts";
import type { Engine } from "../session/engine.ts";
import { distill } from "../train/distill.ts";
import type { JudgeOptions, PackJudge } from "../train/judge.ts";
import { type Output, sum } from "./output.ts";

/** What answers are asked of, and how. */
export interface Asked {
  readonly engine: Engine;
  readonly model: ModelInput;
  readonly options: JudgeOptions;
  readonly judge: PackJudge;
}

/**
 * What a pack may have before it is distilled: coded numbers take more bytes once they were trained, the more so the coarser they are. Of
 * whole files that was 10.5 % at a step of 0.1 and 3 % at 0.07 and 0.03; of private terms 5 to 7 % at 0.03.
 */
function roomOf({ step, grows }: Way): number {
  if (grows === "steps") return 0.92;
  return step === undefined ? 1 : 1 - Math.max(0.04, 1.1 * step);
}

/**
 * @param chosen what a search with these options has found
 * @param steps for each task
 */
export async function distilled(
  chosen: Built<SearchReport>,
  search: SearchOptions,
  asked: Asked,
  steps: number,
  out: Output,
): Promise<Built<SearchReport>> {
  const { report } = chosen;
  const { adapters } = asked.options;
  const [best] = report.tried
    .filter(({ way, divergence }) => divergence !== undefined && way.grows !== "terms")
    .sort((a, b) => a.divergence! - b.divergence!);
  if (!best) return chosen;
  // Made again: a search keeps the best pack only.
  const { dtype, base, anyBase, signal } = search;
  const most = search.goal?.kind === "bytes" ? search.goal.max : Infinity;
  const goal = { kind: "bytes", max: roomOf(best.way) * (most < Infinity ? most : best.bytes!) } as const;
  const projected = await searchPack(adapters, { dtype, base, anyBase, signal, goal, ways: [best.way] });
  const pack = await openPack(new Blob(projected.chunks as BlobPart[]));
  try {
    const chunks = await distilTasks(pack, asked, steps, out);
    const after = await openPack(new Blob(chunks as BlobPart[]));
    const divergence = await asked.judge.judge(after);
    await after.close();
    const bytes = sum(chunks.map(({ length }) => length));
    const won = divergence < report.divergence! && bytes <= most;
    const decision =
      `distilling "${best.name}" took its mean KL from ${best.divergence!.toFixed(4)} to ${divergence.toFixed(4)}: ` +
      (won
        ? "it is taken; ΔW errors are those before"
        : `"${report.name}" stays${bytes > most ? `, since it takes ${bytes} bytes now` : ""}`);
    const decisions = [...report.decisions, decision];
    if (!won) return { ...chosen, report: { ...report, decisions } };
    const found = { name: `${best.name}, distilled`, divergence, bytes, ratio: projected.report.adapterBytes / bytes };
    const { judgedBy, tried } = report;
    return { chunks, report: { ...projected.report, ...found, judgedBy, tried, decisions } };
  } finally {
    await pack.close();
  }
}

/** The pack with all its tasks distilled. */
async function distilTasks(
  pack: Pack,
  { engine, model, options: { adapters, texts, examples, encode, names } }: Asked,
  steps: number,
  out: Output,
): Promise<Uint8Array[]> {
  const session = await createSession(engine, model, pack, { trainable: true, names });
  const blobs = new Map<string, Uint8Array>();
  try {
    for (const [i, adapter] of adapters.entries()) {
      const onStep = ({ step }: { step: number }): void =>
        out.progress("step", i * steps + step, adapters.length * steps, `distilling ${adapter.id}`);
      const { id, file } = await distill(session, { adapter, texts, examples, encode, steps, onStep });
      blobs.set(id, parseTaskFile(file, `task "${id}"`).blob);
    }
  } finally {
    await session.close();
  }
  const chunks: Uint8Array[] = [];
  for await (const chunk of (await freshPack(pack, await tasksOf(pack, blobs))).chunks) chunks.push(chunk);
  return chunks;
}
