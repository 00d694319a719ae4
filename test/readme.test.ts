/**
 * README's first example, run as written: in Node, and in a bundle of esbuild in Chromium. hosting.test.ts runs it on servers, including
 * Vite's and webpack's.
 */

import { execFile } from "node:child_process";
import { readdirSync } from "node:fs";
import { cp, mkdir, mkdtemp, readFile, rm, symlink, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import { build } from "esbuild";
import t, { type Test } from "tap";
import { answerOf, noChromium, openPage } from "./browser.ts";
import { data } from "./packs.ts";
import { EXAMPLE, MODULE } from "./readme.ts";
import { difference, golden, model, modelBytes, packBytes } from "./sessions.ts";

const run = promisify(execFile);
const root = fileURLToPath(new URL("..", import.meta.url));

/** A project that has installed both packages. */
const project = await mkdtemp(join(tmpdir(), "eigenlora-readme-"));
t.teardown(() => rm(project, { recursive: true, maxRetries: 5, retryDelay: 200 }));
await mkdir(join(project, "node_modules/eigenlora"), { recursive: true });
for (const part of ["dist", "package.json"])
  await cp(join(root, part), join(project, "node_modules/eigenlora", part), { recursive: true });
await mkdir(join(project, "node_modules/@huggingface"));
for (const name of ["onnxruntime-node", "onnxruntime-web", "onnxruntime-common", "@huggingface/tokenizers"]) {
  await symlink(join(root, "node_modules", name), join(project, "node_modules", name));
}
await writeFile(join(project, "package.json"), '{"type":"module"}');
await writeFile(join(project, "example.js"), MODULE);
await writeFile(join(project, "printed.js"), EXAMPLE);
const pack = await packBytes(["adapters"], "base");
await writeFile(join(project, "tasks.eigen"), pack);

function check(t: Test, found: number[]): void {
  t.ok(difference(found, golden("base", "two")) < 1e-5, "PEFT's logits");
}

t.test("Node, with its own runtime", async (t) => {
  await writeFile(join(project, "node.js"), MODULE.replace("onnxruntime-web/wasm", "onnxruntime-node"));
  await writeFile(
    join(project, "main.js"),
    `import { main } from "./node.js"; console.log(JSON.stringify(await main(${JSON.stringify(model("torchscript"))})));`,
  );
  const { stdout } = await run(process.execPath, ["main.js"], { cwd: project });
  check(t, JSON.parse(stdout));
});

const page = `import { main } from "./example.js";
globalThis.answer = main("model.onnx");`;

/** Opens a page of these files in Chromium. @returns the model's answer there */
async function browse(t: Test, files: ReadonlyMap<string, Uint8Array>): Promise<number[]> {
  return (await answerOf(
    await openPage(t, new Map([...files, ["model.onnx", modelBytes("torchscript")], ["tasks.eigen", pack]])),
  )) as number[];
}

t.test("a bundle of esbuild in Chromium", { skip: noChromium }, async (t) => {
  const { outputFiles } = await build({
    stdin: { contents: page, resolveDir: project },
    bundle: true,
    format: "esm",
    platform: "browser",
    target: "es2022",
    write: false,
    outfile: "page.js",
  });
  const files = new Map([["page.js", outputFiles[0]!.contents as Uint8Array]]);
  // onnxruntime-web's documentation puts its WebAssembly files beside the bundle.
  const dist = join(root, "node_modules/onnxruntime-web/dist");
  for (const file of readdirSync(dist)) if (file.endsWith(".wasm")) files.set(file, await readFile(join(dist, file)));
  check(t, await browse(t, files));
});

t.test("as printed, with its tokenizer: a sentence is answered with a label", { skip: noChromium }, async (t) => {
  const { outputFiles } = await build({
    stdin: {
      contents: `const said = [];
console.log = (...words) => said.push(words.join(" "));
globalThis.answer = import("./printed.js").then(() => said);`,
      resolveDir: project,
    },
    ...{ bundle: true, format: "esm", platform: "browser", target: "es2022", write: false, outfile: "page.js" },
  });
  const files = new Map([["page.js", outputFiles[0]!.contents as Uint8Array]]);
  const wasm = "ort-wasm-simd-threaded.wasm";
  files.set(wasm, await readFile(join(root, "node_modules/onnxruntime-web/dist", wasm)));
  files.set("model.onnx", await readFile(data("minilm/model_fp16.onnx")));
  files.set("tasks.eigen", await readFile(join(root, "examples/tasks.eigen")));
  for (const file of ["tokenizer.json", "tokenizer_config.json"])
    files.set(file, await readFile(data(`minilm/${file}`)));
  const said = (await answerOf(await openPage(t, files))) as string[];
  t.equal(said.length, 20);
  const [, task, label] = /\/\/ (\S+) (\S+)\n/.exec(EXAMPLE.slice(EXAMPLE.indexOf("console.log")))!;
  t.ok(said.includes(`${task} ${label}`), said.join("\n"));
});
