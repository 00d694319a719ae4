/** Packs of the page in the tests: some of its tasks where not all twenty have to answer every sentence. */
import { readFile, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { openPack } from "eigenlora";
import { writeOfflineWorker } from "../../examples/page/build.js";
import { allOf, freshPack } from "./internals/pack.ts";
import { concat } from "./packs.ts";

/** Leaves only these tasks in a built page. */
export async function keepTasks(folder: string, ids: readonly string[]): Promise<void> {
  const path = join(folder, "tasks.eigen");
  const pack = await openPack(await readFile(path));
  for (const id of [...pack.tasks.keys()]) if (!ids.includes(id)) pack.removeTask(id);
  await writeFile(path, concat(await allOf((await freshPack(pack)).chunks)));
  await writeOfflineWorker(folder);
}
