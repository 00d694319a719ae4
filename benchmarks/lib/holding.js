/** Ways to hold N adapters in JavaScript, and the memory of each. */
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { createRuntime, openPack } from "eigenlora";
import { findAdapters } from "eigenlora/node";
import { openSafetensors } from "../../dist/src/tensor/safetensors.js";
import { folderOf } from "./adapters.js";
import { settledMemory } from "./process.js";

/**
 * Ways: every adapter (as a loader without a pack keeps them, as f32), one adapter at a time (a file is read per
 * switch), our pack with all tasks resident, and our pack with the active task only (a range is read per switch).
 */
export const WAYS = ["all adapters", "one adapter", "pack, all tasks", "pack, active task"];

/**
 * Growth of this process in bytes when it holds adapters in one of the ways.
 * @param {string} way
 * @param {number} count
 * @param {string} pack
 */
export async function hold(way, count, pack) {
  const folders = (await findAdapters([folderOf("own-seed")])).map(({ path }) => path);
  /** @type {unknown[]} */
  const held = [];
  const load = (/** @type {number} */ i) => loadAdapter(folders[i % folders.length]);
  await load(0);
  const before = await settledMemory();
  if (way === "all adapters") for (let i = 0; i < count; i++) held.push(await load(i));
  else if (way === "one adapter") for (let i = 0; i < count; i++) held[0] = await load(i);
  else {
    const opened = await openPack(pack, way === "pack, active task" ? { maxResidentBytes: 1 } : {});
    const runtime = await createRuntime(opened, { mode: "factors" });
    const ids = [...opened.tasks.keys()];
    if (way === "pack, all tasks") await opened.prefetch(ids);
    for (const id of ids.slice(0, 20)) await runtime.switchTask(id);
    held.push(runtime);
  }
  const after = await settledMemory();
  return held.length > 0 ? after.rss - before.rss : NaN;
}

/** All tensors of an adapter as f32. @param {string} folder */
async function loadAdapter(folder) {
  const bytes = await readFile(join(folder, "adapter_model.safetensors"));
  const file = await openSafetensors({
    name: "adapter",
    byteLength: bytes.length,
    read: async (offset, length) => bytes.subarray(offset, offset + length),
  });
  const tensors = new Map();
  for (const name of file.tensors.keys()) tensors.set(name, await file.readF32(name));
  return tensors;
}
