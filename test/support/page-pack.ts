/** Packs of the page in the tests: some of its tasks where not all twenty have to answer every sentence. */
import { readFile, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { openPack, type Pack } from "eigenlora";
import { writeOfflineWorker } from "../../examples/page/build.js";
import { freshPack } from "./internals/pack.ts";
import { concat } from "./packs.ts";

/** Bytes of a pack as written now. */
export async function freshBytes(pack: Pack): Promise<Buffer> {
  const chunks: Uint8Array[] = [];
  for await (const chunk of (await freshPack(pack)).chunks) chunks.push(chunk);
  return Buffer.from(concat(chunks));
}

/** The pack with only these tasks. */
export async function withTasks(pack: Pack, ids: readonly string[]): Promise<Buffer> {
  for (const id of [...pack.tasks.keys()]) if (!ids.includes(id)) pack.removeTask(id);
  return freshBytes(pack);
}

/** Leaves only these tasks in a built page. */
export async function keepTasks(folder: string, ids: readonly string[]): Promise<void> {
  const path = join(folder, "tasks.eigen");
  await writeFile(path, await withTasks(await openPack(await readFile(path)), ids));
  await writeOfflineWorker(folder);
}
