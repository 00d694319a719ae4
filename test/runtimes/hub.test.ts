/**
 * Runs examples/hub on a real Ray cluster of two workers on this machine and kills one in the middle (hub.py). Needs a
 * PYTHON with Ray; fails without it where EIGENLORA_REQUIRE lists "ray".
 */
import { execFile } from "node:child_process";
import { mkdir, readdir, readFile, symlink, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import { openPack } from "eigenlora";
import t from "tap";
import { readTask } from "../../examples/minilm.js";
import { folderFor } from "../support/folder.ts";
import { data, packDifference, packOf } from "../support/packs.ts";
import { lacking, python, pythonLacks, soak } from "../support/required.ts";

const skip = lacking("ray", pythonLacks("ray"));

// The soak takes all. The worker that makes the fourth shard is killed.
const [count, shards] = soak ? [53, 7] : [6, 4];

t.test(`${count} adapters, ${shards} shards, two workers, one killed: the pack of one machine`, { skip }, async (t) => {
  const folder = folderFor(t);
  const [script, main] = ["../support/hub.py", "../../dist/src/cli/main.js"].map((path) =>
    fileURLToPath(new URL(path, import.meta.url)),
  );
  const out = join(folder, "tasks.eigen");
  const some = (await readdir(data("adapters/hub"))).sort().slice(0, count);
  const adapters = join(folder, "adapters");
  await mkdir(adapters);
  for (const name of some) await symlink(data(`adapters/hub/${name}`), join(adapters, name));
  const work = join(folder, "work");
  const text = join(folder, "lines.txt");
  const { train } = await readTask("debtags-role");
  await writeFile(
    text,
    train
      .slice(0, 8)
      .map(([line]) => line)
      .join("\n"),
  );
  const asked = [data("minilm/model_fp16.onnx"), text, String(shards)];
  await promisify(execFile)(python, [script!, adapters, out, work, ...asked, process.execPath, main!], {
    env: { ...process.env, RAY_USAGE_STATS_ENABLED: "0" },
    timeout: 500_000,
  });
  const report = JSON.parse(await readFile(join(work, "report.json"), "utf8"));
  t.match(report, { workers: 2, signal: 9, dead: 1, pack: { tasks: count, modules: 12 } });
  t.ok(report.parts < shards, `killed when ${report.parts} of ${shards} shards were done`);
  t.match(report.distilled, { tasks: 2, modules: 12 }, "and two tasks distilled by one worker after the other");
  const { bytes } = await packOf(
    some.map((name) => `adapters/hub/${name}`),
    {
      select: { kind: "k", k: 32 },
      dtype: { basis: "f32", coefficients: "f32", head: "f32" },
    },
  );
  const [found, expected] = [await openPack(out), await openPack(bytes)];
  t.same([...found.tasks.keys()], [...expected.tasks.keys()]);
  const off = await packDifference(found, expected);
  t.ok(off.bases < 1e-6 && off.coefficients < 1e-6, `bases ${off.bases}, coefficients ${off.coefficients}`);
  await found.close();
});
