/**
 * Work on the device stays there: the command line and the demo leave nothing in the user's home. Without the variable that src/cli/main.ts sets
 * onnxruntime-node keeps a device id and events there. examples.test.ts runs the commands of all pages
 * with such a home, too.
 */
import { execFile } from "node:child_process";
import { writeFile } from "node:fs/promises";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import t from "tap";
import { readTask } from "../../examples/minilm.js";
import { emptyHome } from "../support/empty-home.ts";
import { folderFor } from "../support/folder.ts";
import { data } from "../support/packs.ts";

const root = fileURLToPath(new URL("../..", import.meta.url));
const main = join(root, "dist/src/cli/main.js");

t.test("commands that run a model", async (t) => {
  const folder = folderFor(t);
  const { labels, train } = await readTask("debtags-role");
  const rows = train.slice(0, 6).map(([text, label]) => JSON.stringify({ text, label: labels[label] }));
  await writeFile(join(folder, "rows.jsonl"), rows.join("\n"));
  const { env, written } = await emptyHome(t);
  const run = async (...args: string[]): Promise<string> =>
    (await promisify(execFile)(process.execPath, [main, ...args], { cwd: folder, env })).stdout;

  const model = data("minilm/model_fp16.onnx");
  await run("pack", data("adapters/own-seed/debtags-role"), "-o", "p.eigen", "--k", "4");
  t.match(await run("check", model, "p.eigen"), /run on onnxruntime-node: parity probe passed/);
  const learning = ["--model", model, "--tokens", "8", "--epochs", "1", "--init", "random"];
  t.match(await run("learn", "p.eigen", "rows.jsonl", ...learning, "-o", "mine.eigentask"), /mine\.eigentask/);
  t.same(await written(), []);
});
