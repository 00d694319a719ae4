/** PEFT as the oracle of learned tasks. */
import { spawnSync } from "node:child_process";
import { writeFile } from "node:fs/promises";
import { fileURLToPath } from "node:url";
import type { peftFiles } from "eigenlora/build";
import type { Test } from "tap";
import { writeSafetensors } from "./internals/base.ts";
import { python, skip } from "./required.ts";
import { difference } from "./sessions.ts";

/**
 * Checks that PEFT loads a task as an adapter and answers the same. Skips by name without PEFT, unless it is required.
 * @param base weights that it is loaded on
 * @param feeds of the model, as `trained-oracle.py` takes them
 */
export async function peftAgrees(
  t: Test,
  { config, tensors }: Awaited<ReturnType<typeof peftFiles>>,
  { base, feeds, ours }: { base: string; feeds: object; ours: Float32Array },
): Promise<void> {
  const folder = t.testdir({ adapter: {}, "feeds.json": JSON.stringify(feeds) });
  await writeFile(`${folder}/adapter/adapter_model.safetensors`, writeSafetensors(tensors));
  await writeFile(`${folder}/adapter/adapter_config.json`, JSON.stringify(config));
  const script = fileURLToPath(new URL("trained-oracle.py", import.meta.url));
  const given = [script, base, `${folder}/adapter`, `${folder}/feeds.json`];
  const { status, stdout, stderr, error } = spawnSync(python, given, { encoding: "utf8" });
  if (error || status === 3) return skip(t, "peft", `PEFT is not here: ${error?.message ?? stderr.trim()}`);
  t.equal(status, 0, stderr);
  const theirs = (JSON.parse(stdout) as number[][]).flat();
  t.ok(difference(ours, theirs) <= 1e-4, `${ours} instead of ${theirs}`);
}
