/**
 * Runs docs/getting-started.md as written: its commands and its app, in order, on the real model. Exporting and installing are left out.
 */
import { spawnSync } from "node:child_process";
import { readFileSync } from "node:fs";
import { cp, mkdir, mkdtemp, rm, symlink, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import t from "tap";
import { readTask } from "../examples/minilm.js";
import { emptyHome } from "./empty-home.ts";
import { data } from "./packs.ts";

const root = fileURLToPath(new URL("..", import.meta.url));
const page = readFileSync(join(root, "docs/getting-started.md"), "utf8");
const TASKS = ["debtags-role", "debtags-use"];

/** Files that a reader has after the first two commands. */
async function workplace(): Promise<string> {
  const place = await mkdtemp(join(tmpdir(), "eigenlora-started-"));
  for (const id of TASKS)
    await cp(data(`adapters/own-seed/${id}`), join(place, "my-adapters", id), { recursive: true });
  await mkdir(join(place, "onnx"));
  await symlink(data("minilm/model_fp16.onnx"), join(place, "onnx/model.onnx"));
  for (const file of ["tokenizer.json", "tokenizer_config.json"])
    await symlink(data(`minilm/${file}`), join(place, "onnx", file));
  await mkdir(join(place, "node_modules"));
  for (const name of ["onnxruntime-node", "onnxruntime-common", "@huggingface"])
    await symlink(join(root, "node_modules", name), join(place, "node_modules", name));
  await symlink(root, join(place, "node_modules/eigenlora"));
  await writeFile(join(place, "package.json"), JSON.stringify({ type: "module" }));
  const { labels, train } = await readTask("sections-0");
  const lines = [0, 1].flatMap((label) => train.filter((row) => row[1] === label).slice(0, 6));
  await writeFile(
    join(place, "lines.jsonl"),
    lines.map(([text, label]) => JSON.stringify({ text, label: labels[label] })).join("\n"),
  );
  return place;
}

t.test("commands and app of the page", async (t) => {
  const place = await workplace();
  t.teardown(() => rm(place, { recursive: true, maxRetries: 5, retryDelay: 200 }));
  await writeFile(join(place, "main.js"), /^```js\n([\s\S]*?)^```$/m.exec(page)![1]!);
  const commands = [...page.matchAll(/^```sh\n([\s\S]*?)^```$/gm)]
    .flatMap(([, block]) => block!.trim().split("\n"))
    .filter((line) => !/^(pip|optimum-cli|npm) /.test(line));
  t.ok(commands.length >= 6, "there is something to run");
  const said = new Map<string, string>();
  const { env, written } = await emptyHome(t);
  for (const line of commands) {
    const words = line.replace(/^npx eigenlora/, `node ${join(root, "dist/src/cli/main.js")}`).split(" ");
    t.equal(words.shift(), "node", line);
    const { status, stdout, stderr } = spawnSync(process.execPath, words, { cwd: place, encoding: "utf8", env });
    t.equal(status, 0, line, { stdout, stderr });
    said.set(line.split(" ").slice(0, 3).join(" "), stdout);
  }
  t.match(said.get("npx eigenlora check"), /^It works, in mode /m);
  for (const id of TASKS) t.match(said.get("node main.js"), new RegExp(`^${id} [a-z]`, "m"), "an answer by its name");
  t.match(said.get("npx eigenlora add"), /1 tasks? added/);
  t.same(await written(), [], "nothing in the home");
});
