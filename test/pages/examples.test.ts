/**
 * Examples in doc comments, and every code block of README, docs and examples: JavaScript compiles against the built
 * package, and all of them run on the test data, each by its language: in Node, in Chromium, in bash, in Python. A
 * block that is not run says why in its page (`test/support/blocks.ts`). A tool that this machine lacks (Chromium,
 * torch, transformers.js) skips its blocks by name, unless EIGENLORA_REQUIRE lists it.
 * `test/support/examples/values.js` holds the values that examples assume.
 */
import { execFile, spawnSync } from "node:child_process";
import { existsSync, readFileSync } from "node:fs";
import { chmod, copyFile, cp, mkdir, readdir, readFile, rm, symlink, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { promisify } from "node:util";
import { openPack } from "eigenlora";
import { type BuildOptions, buildPack, encodeTaskFile, readGguf } from "eigenlora/build";
import { readAdapters } from "eigenlora/node";
import { build } from "esbuild";
import t, { type Test } from "tap";
import ts from "typescript";
import { readTask } from "../../examples/minilm.js";
import { BLOCKS, type Block, blocksIn, PAGES } from "../support/blocks.ts";
import { answerOf, beTheCdn, launch, noChromium, openPage } from "../support/browser.ts";
import { folderFor, fromRoot } from "../support/folder.ts";
import { hubFor } from "../support/huggingface-server.ts";
import { concat, data, LOSSLESS } from "../support/packs.ts";
import { packages, python, required } from "../support/required.ts";
import { surface } from "../tools/api.js";
import { SIGNER } from "../vectors/valid.js";

const root = fromRoot("");
const folder = join(root, "test/support/examples");
const values = join(folder, "values.js");

interface Example {
  /** Place of the example. */
  readonly place: string;
  /** Block that holds the example, where a page has it. */
  readonly block?: Block;
  /** Names that come from the example's own subpath, although others export them too. */
  readonly own?: ReadonlyMap<string, string>;
  readonly code: string;
}

const exported = new Map<string, string>();
const examples: Example[] = [];
for (const { subpath, name, examples: tags } of surface().exports) {
  if (!exported.has(name)) exported.set(name, subpath);
  const own = new Map([[name, subpath]]);
  tags.forEach((text, i) => {
    const fenced = blocksIn(subpath, `${text}\n`).map(({ code }) => code);
    examples.push({ place: `${subpath} ${name} ${i + 1}`, own, code: fenced.length > 0 ? fenced.join("\n") : text });
  });
}
const JAVASCRIPT = new Set(["js", "ts"]);
/** Files of examples that a page shows: the tests of the examples run them. */
const SHOWN = new Set([readFileSync(join(root, "examples/worker/worker.js"), "utf8")]);
for (const block of BLOCKS) {
  if (JAVASCRIPT.has(block.language) && !SHOWN.has(block.code) && block.page !== "docs/api-report.md")
    examples.push({ place: block.place, block, code: block.code });
}

/** Names that a code uses and does not declare. */
function freeNames(source: ts.SourceFile): Set<string> {
  const used = new Set<string>();
  const declared = new Set<string>();
  const visit = (node: ts.Node): void => {
    if (ts.isIdentifier(node)) {
      const { parent } = node;
      if (
        (ts.isPropertyAccessExpression(parent) && parent.name === node) ||
        (ts.isPropertyAssignment(parent) && parent.name === node) ||
        (ts.isBindingElement(parent) && parent.propertyName === node) ||
        (ts.isMethodDeclaration(parent) && parent.name === node)
      ) {
        // A member's name.
      } else if ("name" in parent && parent.name === node && !ts.isShorthandPropertyAssignment(parent))
        declared.add(node.text);
      else used.add(node.text);
    }
    ts.forEachChild(node, visit);
  };
  visit(source);
  return new Set([...used].filter((name) => !declared.has(name)));
}

const known = new Set(Object.keys((await import(values)).values));

/** Turns an example into a module: its imports, then a function of the values it assumes. */
function moduleOf({ code, own }: Example): { text: string; names: string[]; packages: string[] } {
  const source = ts.createSourceFile("example.ts", code, ts.ScriptTarget.Latest, true);
  const imports = source.statements.filter((statement) => ts.isImportDeclaration(statement));
  const body = source.statements.filter((statement) => !ts.isImportDeclaration(statement));
  const free = freeNames(source);
  const names = [...known].filter((name) => free.has(name));
  const missing = [...free].filter((name) => exported.has(name) && !known.has(name));
  const text = [
    ...imports.map((statement) => statement.getText(source)),
    ...missing.map((name) => `import { ${name} } from "${own?.get(name) ?? exported.get(name)}";`),
    'import type { values } from "./values.js";',
    "type Given = { [Name in keyof typeof values]: Awaited<ReturnType<(typeof values)[Name]>> };",
    `export default async function ({ ${names.join(", ")} }: Given) {`,
    ...body.map((statement) => statement.getFullText(source)),
    "}",
  ].join("\n");
  return { text, names, packages: imports.map(({ moduleSpecifier }) => (moduleSpecifier as ts.StringLiteral).text) };
}

const modules = examples.map((example, i) => ({
  ...example,
  ...moduleOf(example),
  file: join(folder, `${i}.ts`),
}));

t.test("examples compile", async (t) => {
  const ambient = join(folder, "ambient.d.ts");
  const texts = new Map(modules.map(({ file, text }) => [file, text]));
  texts.set(
    ambient,
    'declare module "@huggingface/transformers" { export const env: any, pipeline: any, TextStreamer: any, Tensor: any; }' +
      'declare module "@tensorflow/tfjs"; declare module "@jax-js/jax";' +
      'declare module "@dr.pogodin/react-native-fs"; declare module "onnxruntime-react-native"; declare module "*.wasm";',
  );
  const options: ts.CompilerOptions = {
    module: ts.ModuleKind.Node20,
    target: ts.ScriptTarget.ES2022,
    lib: ["lib.es2023.d.ts", "lib.dom.d.ts", "lib.dom.iterable.d.ts"],
    types: ["node"],
    strict: true,
    noImplicitAny: false,
    allowJs: true,
    noEmit: true,
    skipLibCheck: true,
  };
  const host = ts.createCompilerHost(options);
  const { getSourceFile, fileExists, readFile } = host;
  host.fileExists = (file) => texts.has(file) || fileExists(file);
  host.readFile = (file) => texts.get(file) ?? readFile(file);
  host.getSourceFile = (file, language, ...rest) =>
    texts.has(file)
      ? ts.createSourceFile(file, texts.get(file)!, language)
      : getSourceFile.call(host, file, language, ...rest);
  const program = ts.createProgram([...texts.keys()], options, host);
  for (const { file, place, code } of modules) {
    const source = program.getSourceFile(file)!;
    const errors = [...program.getSyntacticDiagnostics(source), ...program.getSemanticDiagnostics(source)];
    t.same(
      errors.map(({ messageText }) => ts.flattenDiagnosticMessageText(messageText, " ")),
      [],
      place,
      { code },
    );
  }
});

/** Packs a folder of adapters into a file. */
async function packInto(file: string, adapters: string, options: BuildOptions = {}): Promise<void> {
  const read = await readAdapters([adapters]);
  const { chunks } = await buildPack(read, options);
  await writeFile(file, concat(chunks));
  await Promise.all(read.map((adapter) => adapter.close()));
}

/** Puts the packages that pages name into a folder. */
async function linkPackages(place: string): Promise<void> {
  const modules = join(place, "node_modules");
  await mkdir(join(modules, "@huggingface"), { recursive: true });
  await symlink(root, join(modules, "eigenlora"));
  for (const name of ["onnxruntime-node", "onnxruntime-web", "onnxruntime-common", "@huggingface/tokenizers"])
    await symlink(join(root, "node_modules", name), join(modules, name));
  const transformers = "@huggingface/transformers";
  if (existsSync(packages(transformers))) await symlink(packages(transformers), join(modules, transformers));
  await writeFile(join(place, "package.json"), JSON.stringify({ type: "module" }));
}

/** Puts the files that examples in Node name into a folder: a tiny BERT, its tasks, and packs of other models. */
async function tinyPlace(t: Test): Promise<string> {
  const place = folderFor(t);
  await linkPackages(place);
  const copies = { "debtags-role": "two", sst2: "three", cola: "three", sentiment: "two", topics: "five" };
  for (const [id, name] of Object.entries(copies)) {
    for (const hub of ["my-adapters", "hub", "adapters"]) {
      await cp(data(`sessions/adapters/${name}`), join(place, hub, id), { recursive: true });
    }
  }
  const base = data("sessions/base.safetensors");
  await packInto(join(place, "tasks.eigen"), join(place, "my-adapters"), { ...LOSSLESS, base });
  const pack = await openPack(join(place, "tasks.eigen"));
  const blob = await pack.stored("sst2");
  await writeFile(join(place, "sst2.eigentask"), encodeTaskFile(pack.tasks.get("sst2")!, pack.basisId, blob));
  await pack.close();
  await cp(fromRoot("test/vectors/valid/signed.eigen"), join(place, "signed.eigen"));
  await writeFile(join(place, "key.pem"), SIGNER.pem);
  for (const file of ["adapter_config.json", "adapter_model.safetensors"]) {
    await cp(data(`sessions/adapters/two/${file}`), join(place, file));
  }
  const formats = {
    "diffusers-old-text/adapter.safetensors": "styles/ukiyo-e/pytorch_lora_weights.safetensors",
    "kohya/adapter.safetensors": "ukiyo-e.safetensors",
    "gguf/adapter-f32.gguf": "rhymes.gguf",
    "onnx-adapter/adapter.onnx_adapter": "rhymes.onnx_adapter",
  };
  for (const [from, to] of Object.entries(formats)) await cp(data(`goldens/formats/${from}`), join(place, to));
  const gguf = join(place, "rhymes.gguf");
  const skill = await readGguf({ id: "rhymes", file: gguf, tensors: gguf, base: { heads: 4, kvHeads: 2 } });
  await writeFile(join(place, "rhymes.eigen"), concat((await buildPack([skill], LOSSLESS)).chunks));
  const textToText = data("seq2seq/base.safetensors");
  await packInto(join(place, "skills.eigen"), data("seq2seq/adapters"), { ...LOSSLESS, base: textToText });
  await cp(data("seq2seq/onnx/encoder_model.onnx"), join(place, "encoder.onnx"));
  await cp(data("seq2seq/decoder.onnx"), join(place, "decoder.onnx"));
  await packInto(join(place, "llm.eigen"), data("decoder/adapters"), LOSSLESS);
  await cp(data("decoder/onnx/model.onnx"), join(place, "llm.onnx"));
  await cp(data("sessions/torchscript.onnx"), join(place, "model.onnx"));
  await cp(data("sessions/base.safetensors"), join(place, "model.safetensors"));
  const { hub } = await hubFor(t);
  hub.push("org/name", new Map([["tasks.eigen", await readFile(join(place, "tasks.eigen"))]]));
  const model = await readFile(join(place, "model.onnx"));
  hub.push("org/model", new Map(["onnx/model.onnx", "onnx/model_q4.onnx"].map((path) => [path, model])));
  return place;
}

/**
 * Puts MiniLM, adapters and packs of it into a folder, under the names that pages have for them.
 * @param packed names of the pack's tasks
 */
async function realPlace(t: Test, packed: readonly string[] = ["spam", "topic"]): Promise<string> {
  const place = folderFor(t);
  await linkPackages(place);
  const adapters = { packed, "my-adapters": ["spam", "topic"], adapters: ["a-spam", "b-topic"], hub: ["sst2", "cola"] };
  const sources = ["debtags-role", "debtags-use"];
  for (const [folder, ids] of Object.entries(adapters)) {
    for (const [i, id] of ids.entries())
      await cp(data(`adapters/own-seed/${sources[i % 2]}`), join(place, folder, id), { recursive: true });
  }
  // Components of two adapters hold little of another one than these.
  await cp(join(place, "packed", packed[0]!), join(place, "new-adapter"), { recursive: true });
  await packInto(join(place, "tasks.eigen"), join(place, "packed"));
  for (const folder of [".", "onnx", "models/my-model/onnx", "models/minilm/onnx"]) {
    await mkdir(join(place, folder), { recursive: true });
    const model = folder.startsWith("models") ? "model_fp16.onnx" : "model.onnx";
    await symlink(data("minilm/model_fp16.onnx"), join(place, folder, model));
    for (const file of ["config.json", "tokenizer.json", "tokenizer_config.json"])
      await cp(data(`minilm/${file}`), join(place, folder.replace(/(?<=models.*)\/onnx/, ""), file));
  }
  const { labels, train } = await readTask("sections-0");
  const rows = [0, 1].flatMap((label) => train.filter((row) => row[1] === label).slice(0, 6));
  const lines = rows.map(([text, label]) => JSON.stringify({ text, label: labels[label] }));
  await writeFile(join(place, "lines.jsonl"), lines.join("\n"));
  await copyFile(data("seq2seq/onnx/encoder_model.onnx"), join(place, "onnx/encoder_model.onnx"));
  await copyFile(data("seq2seq/onnx/decoder_model_merged.onnx"), join(place, "onnx/decoder_model_merged.onnx"));
  const base = data("seq2seq/base.safetensors");
  await packInto(join(place, "seq2seq.eigen"), data("seq2seq/adapters"), { ...LOSSLESS, base });
  const language = join(place, "models/smollm2");
  await mkdir(join(language, "onnx"), { recursive: true });
  for (const file of ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"])
    await cp(data(`decoder/${file}`), join(language, file));
  for (const name of ["model.onnx", "model_q4.onnx"])
    await cp(data("decoder/onnx/model.onnx"), join(language, "onnx", name));
  await cp(data("decoder/adapters"), join(place, "skills"), { recursive: true });
  await cp(data("decoder/adapters/upper"), join(place, "skills/past-tense"), { recursive: true });
  await packInto(join(place, "skills.eigen"), join(place, "skills"), LOSSLESS);
  const plurals = [..."abcdefgh"].map((prompt) => JSON.stringify({ prompt, completion: ` ${prompt}s` }));
  await writeFile(join(place, "plurals.jsonl"), plurals.join("\n"));
  const rowsOf = (value: number) =>
    Array.from({ length: 3 }, (_, row) => [101, 2000 + row, 102].map((id) => value || id));
  const feeds = {
    input_ids: rowsOf(0),
    attention_mask: rowsOf(1),
    token_type_ids: rowsOf(0).map((row) => row.map(() => 0)),
  };
  await writeFile(join(place, "feeds.json"), JSON.stringify(feeds));
  return place;
}

const UNMARKED = BLOCKS.filter(({ marker }) => marker === undefined);
/** Places of blocks that were run, or that a machine without their tool skips. */
const tried = new Set<string>();
const shown = UNMARKED.filter(({ code }) => SHOWN.has(code));
for (const { place } of shown) tried.add(place);

/** Passes with the tool's absence as reason, or fails where the tool is required. */
function lacks(t: Test, place: string, tool: string, names: readonly string[]): void {
  if (names.some((name) => required.has(name))) t.fail(`${place}: ${tool} is not here`);
  else t.pass(place, { skip: `${tool} is not here` });
}

const inBrowser = ({ packages }: { packages: readonly string[] }): boolean => packages.includes("onnxruntime-web/wasm");
const ofTransformers = ({ text }: { text: string }): boolean => /@huggingface\/transformers|\bpipe\b/.test(text);
/** Blocks that the page's next command runs: `node main.js`. */
const isMain = ({ block }: Example): boolean =>
  block !== undefined && BLOCKS[BLOCKS.indexOf(block) + 1]?.code === "node main.js\n";

/** Runs examples in a folder, in one process of Node. */
async function runInNode(t: Test, place: string, those: typeof modules): Promise<void> {
  const listed = [];
  for (const { text, names, file } of those) {
    const script = join(place, `${modules.findIndex((module) => module.file === file)}.mjs`);
    const compilerOptions = { target: ts.ScriptTarget.ES2022, module: ts.ModuleKind.ESNext };
    await writeFile(script, ts.transpileModule(text, { compilerOptions }).outputText);
    listed.push({ file: script, names });
  }
  await writeFile(join(place, "examples.json"), JSON.stringify(listed));
  const { stdout } = await promisify(execFile)(process.execPath, [join(folder, "run.js")], { cwd: place });
  const results = JSON.parse(stdout.trimEnd().split("\n").at(-1)!) as { error?: string; absent?: string }[];
  for (const [i, { error, absent }] of results.entries()) {
    const { place, packages, code, block } = those[i]!;
    if (block) tried.add(block.place);
    const lacking = absent ?? packages.find((name) => /^@(tensorflow|jax-js|dr\.pogodin)\/|\.wasm$/.test(name));
    // What is never here needs a marker; an example in a doc comment has none.
    if (lacking === "transformers.js") lacks(t, place, lacking, ["transformers"]);
    else if (lacking && block) t.fail(`${place}: needs ${lacking}; mark it: <!-- not run: needs ${lacking} -->`);
    else if (lacking) t.pass(place, { skip: `${lacking} is not here` });
    else t.equal(error, undefined, place, { code });
  }
}

const runnable = modules.filter(({ block }) => block?.marker === undefined);

t.test("JavaScript runs in Node", async (t) => {
  const those = runnable.filter((module) => !inBrowser(module) && !isMain(module));
  await runInNode(
    t,
    await tinyPlace(t),
    those.filter((module) => !ofTransformers(module)),
  );
  await runInNode(
    t,
    await realPlace(t, ["first", "second", "debtags-role"]),
    those.filter((module) => ofTransformers(module)),
  );
});

/** Files of a page in a browser: README's model, its tokenizer and its pack. */
async function filesOfPage(): Promise<Map<string, Uint8Array>> {
  const files = new Map([["model.onnx", await readFile(data("minilm/model_fp16.onnx"))]]);
  files.set("tasks.eigen", await readFile(join(root, "examples/tasks.eigen")));
  for (const file of ["tokenizer.json", "tokenizer_config.json"])
    files.set(file, await readFile(data(`minilm/${file}`)));
  const wasm = "ort-wasm-simd-threaded.wasm";
  return files.set(wasm, await readFile(join(root, "node_modules/onnxruntime-web/dist", wasm)));
}

t.test("JavaScript for browsers runs in Chromium", async (t) => {
  const place = folderFor(t);
  await linkPackages(place);
  for (const { place: from, code, block } of runnable.filter(inBrowser)) {
    tried.add(block!.place);
    if (noChromium) {
      lacks(t, from, "chromium", ["chromium"]);
      continue;
    }
    await writeFile(join(place, "example.js"), code);
    const contents = `const said = [];
console.log = (...words) => said.push(words.join(" "));
globalThis.answer = import("./example.js").then(() => said);`;
    const { outputFiles } = await build({
      ...{ stdin: { contents, resolveDir: place }, outfile: "page.js", write: false },
      ...{ bundle: true, format: "esm", platform: "browser", target: "es2022" },
    });
    const files = (await filesOfPage()).set("page.js", outputFiles![0]!.contents);
    const said = (await answerOf(await openPage(t, files))) as string[];
    for (const [, words] of code.matchAll(/console\.log\(.*; \/\/ (.*)/g)) t.ok(said.includes(words!), said.join("\n"));
    t.pass(from);
  }
});

t.test("HTML runs in Chromium", async (t) => {
  const place = folderFor(t);
  await linkPackages(place);
  const browser = noChromium ? undefined : await launch(t);
  for (const { place: from, code } of UNMARKED.filter(({ language }) => language === "html")) {
    tried.add(from);
    if (!browser) {
      lacks(t, from, "chromium", ["chromium"]);
      continue;
    }
    const told = code.includes('type="module"')
      ? code.replace(/(?=<\/script>\s*$)/, "globalThis.answer = 1;")
      : `${code}<script type="module">await import("eigenlora/browser"); globalThis.answer = 1;</script>`;
    const context = await browser.newContext();
    await beTheCdn(t, context, join(place, "node_modules"));
    const page = new TextEncoder().encode(`<!doctype html>${told}`);
    t.equal(await answerOf(await openPage(t, (await filesOfPage()).set("index.html", page), context)), 1, from);
  }
});

/** Commands for bash: the command line of this build, and stand-ins for what would install. */
async function commandsFor(place: string): Promise<string> {
  const bin = join(place, "bin");
  await mkdir(bin);
  const main = `exec "${process.execPath}" "${join(root, "dist/src/cli/main.js")}" "$@"`;
  const known = "eigenlora|onnxruntime-node|onnxruntime-web|@huggingface/tokenizers|@huggingface/transformers";
  const scripts = {
    eigenlora: main,
    npx: `[ "$1" = eigenlora ] || exit 1; shift; ${main}`,
    npm: `case "$1" in init|pkg) exit 0;; install) shift; for name; do case "$name" in ${known}) ;; *) exit 1;; esac; done;; *) exit 1;; esac`,
  };
  for (const [name, script] of Object.entries(scripts)) {
    await writeFile(join(bin, name), `#!/bin/sh\n${script}\n`);
    await chmod(join(bin, name), 0o755);
  }
  return bin;
}

/** Output that pages promise, by page. */
const PROMISED: Readonly<Record<string, readonly RegExp[]>> = {
  "docs/use.md": [/^It works, in mode /m, /^spam [a-z]/m, /^topic [a-z]/m],
  "docs/layers.md": [/^It works, in mode /m],
  "docs/pack.md": [/1 tasks? added/],
  "docs/train.md": [/1 tasks? added/],
};

/** Folders of pages whose commands have run: Python goes on there. */
const places = new Map<string, string>();

t.test("commands run in bash", async (t) => {
  const place = await realPlace(t.parent as Test);
  const bin = await commandsFor(place);
  // onnxruntime-node would keep a device id and events in the home, but for the variable that src/cli/main.ts sets; and
  // nothing where CI is set.
  const home = folderFor(t);
  for (const page of PAGES) {
    const blocks = UNMARKED.filter((block) => block.page === page && block.language === "sh");
    if (blocks.length === 0) continue;
    const cwd = folderFor(t.parent as Test);
    await cp(place, cwd, { recursive: true, verbatimSymlinks: true });
    places.set(page, cwd);
    let said = "";
    for (const block of blocks) {
      const { code, place: from } = block;
      tried.add(from);
      for (const [, output] of code.matchAll(/ -o (\S+)/g)) await rm(join(cwd, output!), { force: true });
      if (code === "node main.js\n") await writeFile(join(cwd, "main.js"), BLOCKS[BLOCKS.indexOf(block) - 1]!.code);
      if (code.includes("encoder_model.onnx")) await copyFile(join(cwd, "seq2seq.eigen"), join(cwd, "tasks.eigen"));
      const how = { cwd, encoding: "utf8", env: { HOME: home, PATH: `${bin}:${process.env["PATH"]}` } } as const;
      const { status, stdout, stderr } = spawnSync("bash", ["-e", "-c", code], how);
      t.equal(status, 0, from, { code, stdout, stderr });
      said += stdout;
    }
    for (const promised of PROMISED[page] ?? []) t.match(said, promised, page);
  }
  t.same(await readdir(home, { recursive: true }), [], "nothing in the home");
});

t.test("Python runs", async (t) => {
  const blocks = UNMARKED.filter(({ language }) => language === "python");
  for (const page of new Set(blocks.map((block) => block.page))) {
    const those = blocks.filter((block) => block.page === page);
    const cwd = places.get(page) ?? folderFor(t);
    await cp(data("minilm"), join(cwd, "minilm"), { recursive: true });
    await writeFile(join(cwd, "blocks.json"), JSON.stringify(those));
    const { stdout, stderr, error } = spawnSync(python, [join(folder, "run.py")], { cwd, encoding: "utf8" });
    const results = error
      ? []
      : (JSON.parse(stdout.trimEnd().split("\n").at(-1) || "[]") as { error?: string; absent?: string }[]);
    for (const [i, { place, code }] of those.entries()) {
      tried.add(place);
      const absent = error ? python : results[i]?.absent;
      if (absent) lacks(t, place, absent, ["peft"]);
      else t.same(results[i], {}, place, { code, stderr });
    }
  }
});

t.test("JSON parses", async (t) => {
  for (const { place, code } of UNMARKED.filter(({ language }) => language === "json")) {
    tried.add(place);
    t.ok(JSON.parse(code), place);
  }
});

t.test("README's first example compiles with what tsc --init writes", async (t) => {
  const place = folderFor(t);
  await linkPackages(place);
  await writeFile(
    join(place, "main.ts"),
    BLOCKS.find(({ page, language }) => page === "README.md" && language === "js")!.code,
  );
  for (const args of [["--init"], ["--noEmit", "-p", "."]]) {
    const tsc = join(root, "node_modules/typescript/bin/tsc");
    const { status, stdout } = spawnSync(process.execPath, [tsc, ...args], { cwd: place, encoding: "utf8" });
    t.equal(status, 0, args.join(" "), { stdout });
  }
});

/** A marker that marks nothing. */
const STRAY = /(?<=.|\n)<!-- not run: .*(?!\n+```\w)\n/;

t.test("every block is run, or its page says why not", async (t) => {
  for (const block of runnable.filter(isMain)) tried.add(block.block!.place);
  t.same(
    UNMARKED.map(({ place }) => place).filter((place) => !tried.has(place)),
    [],
    "mark them in front of the block: <!-- not run: reason -->",
  );
  t.same(
    PAGES.filter((page) => STRAY.test(readFileSync(join(root, page), "utf8"))),
    [],
    "a marker stands in front of a block, or at the top of a page",
  );
  const languages = [...new Set(BLOCKS.map(({ language }) => language))];
  for (const name of languages) {
    const all = BLOCKS.filter(({ language }) => language === name);
    t.comment(
      `${name}: ${all.filter(({ marker }) => !marker).length} run, ${all.filter(({ marker }) => marker).length} marked`,
    );
  }
});
