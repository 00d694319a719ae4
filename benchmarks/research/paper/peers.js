/** VeRA and PiSSA, which PEFT trains in Python on one thread: the same rows, steps, batches and schedule. */
import { writeFile } from "node:fs/promises";
import { join } from "node:path";
import { data } from "../../../examples/minilm.js";
import { safetensorsOf } from "../../lib/adapters.js";
import { missing, python } from "../../lib/peers.js";
import { inScratch } from "../../lib/process.js";
import { baseEntries } from "../../lib/torch.js";

/** Reason why Python cannot run the peers; undefined where it can. */
export const reasonAgainst = () => missing(["torch", "peft", "transformers"]);

/**
 * @param {object} job as peers/paper.py describes it, without base and config
 * @returns {Promise<{ version: string, trained: number, head: number, loss: number[], logits: number[][] }>}
 * @throws Error with the end of what Python wrote when it fails
 */
export const runPeer = (job) =>
  inScratch(async (folder) => {
    const base = join(folder, "base.safetensors");
    // Only the encoder; the head is the task's own.
    const entries = (await baseEntries()).map((entry) => ({ ...entry, name: entry.name.replace(/^bert\./, "") }));
    await writeFile(base, await safetensorsOf(entries));
    const found = python("paper.py", [], JSON.stringify({ ...job, base, config: data("minilm") }));
    if ("reason" in found) throw new Error(`paper.py: ${found.reason}`);
    return found.figures;
  });
