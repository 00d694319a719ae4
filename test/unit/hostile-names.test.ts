/** Names from files: no character of them may move a cursor, change colours or forge a line. */
import { spawnSync } from "node:child_process";
import { cp, readFile, writeFile } from "node:fs/promises";
import { basename, join } from "node:path";
import { encodeTaskFile } from "eigenlora/build";
import t from "tap";
import { folderFor, fromRoot } from "../support/folder.ts";
import { encodeTensor, toHex } from "../support/internals/base.ts";
import { paragraph, printable, runProgram } from "../support/internals/cli.ts";
import { encodeBasis, encodeTask, sha256 } from "../support/internals/format.ts";
import { data, freshChunks } from "../support/packs.ts";

const folder = folderFor(t);

/** Clears the screen, in two ways; forges a line, in two ways; turns the direction of writing, in two ways. */
const evil = "\u001b[2J\u009b2J\r\nwarning: forged\u2028\u202e\u2066\u007f";
/** Ids of tasks may not have control characters, but may have these. */
const turned = "\u202eksat\u2069";
const dangerous = /[^\P{Cc}\n]|[\p{Bidi_Control}\u2028\u2029]/u;

const encoded = encodeTensor("f32", Float32Array.of(1, 2), 1, 2);
const side = { K: 1, mean: false, dtype: "f32", explained: 1, encoded } as const;
const { description, bases } = encodeBasis({
  producer: `someone${evil}`,
  gauge: `as-trained${evil}`,
  centering: `keep${evil}`,
  baseModel: `model${evil}`,
  modules: [{ name: `layer${evil}`, out: 2, in: 2, layout: "out-in", A: [side], B: [side] }],
});
const basisId = toHex(await sha256(description, bases));
const coefficients = {
  mean: false,
  dtype: "f32",
  encoded: encodeTensor("f32", Float32Array.of(1), 1, 1),
} as const;
const blob = encodeTask(
  [{ module: 0, rank: 1, A: coefficients, B: coefficients }],
  [{ name: `head${evil}`, role: "saved", shape: [1, 2], dtype: "f32", encoded }],
);
const entry = { id: turned, adapterBytes: 0, metadata: { labels: [`label${evil}`], [`key${evil}`]: evil } };
const pack = Buffer.concat(await freshChunks({ description, bases, basisId, tasks: [{ entry, blob }] }));
const path = join(folder, `pack${evil.replaceAll("/", "")}.eigen`);
await writeFile(path, pack);
const damaged = join(folder, "damaged\u001b[31m.eigen");
const bytes = Buffer.from(pack);
bytes[bytes.length - 1]! ^= 1;
await writeFile(damaged, bytes);
const taskFile = join(folder, "task\u001b[31m.eigentask");
await writeFile(taskFile, encodeTaskFile(entry, basisId, blob));

const adapter = data("adapters/own-seed/debtags-role");
const commands: [number, ...string[]][] = [
  [0, "inspect", path],
  [0, "verify", path],
  [1, "verify", damaged],
  [1, "verify", path, "--against", adapter],
  [1, "add", path, adapter],
  [1, "add", path, taskFile],
  [1, "remove", path, "nobody"],
  [2, "remove", path, turned],
  [1, "export", path, "--task", evil, "-o", join(folder, "x")],
  [0, "export", path, "--task", turned, "-o", join(folder, "out\u001b[31m")],
  [1, "fold", path, "--task", turned, "--base", data("goldens/peft/plain/base.safetensors"), "-o", join(folder, "x")],
  [1, "attach", data("onnx/by-hand.onnx"), path, "-o", join(folder, "x.onnx")],
  [1, "inspect", join(folder, evil)],
  [2, evil],
  [2, "pack", evil, `--${evil}`],
];

t.test("commands and errors, as text and as JSON", async (t) => {
  for (const [status, ...args] of commands) {
    const name = args.map((arg) => basename(arg).replace(/[^a-z.-]+/g, "_")).join(" ");
    let [text, json] = ["", ""];
    const said = { write: (more: string): unknown => (text += more) };
    const taken = { write: (more: string): unknown => (json += more) };
    t.equal(await runProgram(args, said, said), status, name);
    t.notMatch(text, dangerous, name);
    t.notMatch(text, /^warning: forged/m, name);
    t.ok(text.length > 0, "it says something");
    await runProgram([...args, "--json"], taken, taken);
    t.notMatch(json, dangerous, `${name} --json`);
    t.type(JSON.parse(json), "object");
  }
});

t.test("JSON says the names as they are", async (t) => {
  let said = "";
  await runProgram(["inspect", path, "--json"], { write: (more) => (said += more) }, { write: () => undefined });
  t.match(JSON.parse(said), {
    producer: `someone${evil}`,
    modules: [{ name: `layer${evil}` }],
    tasks: [{ id: turned, metadata: entry.metadata }],
  });
});

t.test("warnings", async (t) => {
  for (const name of ["a", "b"]) {
    await cp(adapter, join(folder, name), { recursive: true });
    const file = join(folder, name, "adapter_config.json");
    const config = JSON.parse(await readFile(file, "utf8"));
    await writeFile(file, JSON.stringify({ ...config, base_model_name_or_path: `${name}${evil}` }));
  }
  const main = fromRoot("dist/src/cli/main.js");
  const args = ["pack", "a", "b", "-o", "p.eigen", "--k", "2", "--any-base"];
  const { stderr, status } = spawnSync(process.execPath, [main, ...args], { cwd: folder, encoding: "utf8" });
  t.equal(status, 0);
  t.match(
    stderr,
    /^warning: the adapters name different base models, so the pack names none: a\\u001b\[2J\\u009b2J\\u000d\n {2}warning: forged/m,
  );
  t.notMatch(stderr, dangerous);
});

t.test("what is spelt out, and what is not", async (t) => {
  t.equal(printable("Größe 界 👩‍🔬 ΔW ‖"), "Größe 界 👩‍🔬 ΔW ‖");
  t.equal(printable("\t\n\u0000\u009f\u200f"), "\\u0009\\u000a\\u0000\\u009f\\u200f");
  t.equal(paragraph("a\nb\u001b"), "a\n  b\\u001b");
});
