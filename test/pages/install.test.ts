/**
 * The package from a user's side: packed, installed into an empty project, compiled against, run on the command line
 * and in a page without a bundler. And the apps of `examples/`, each in a project with the installed package.
 */
import { spawnSync } from "node:child_process";
import { existsSync } from "node:fs";
import { copyFile, cp, mkdir, readdir, readFile, symlink, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { gzipSync } from "node:zlib";
import { createRuntime, openPack } from "eigenlora";
import type { Page } from "playwright-core";
import t, { type Test } from "tap";
import ts from "typescript";
import { serveFolder } from "../../examples/page/serve.js";
import { answerOf, beTheCdn, launch, noChromium } from "../support/browser.ts";
import { bundleWorker, metro, noProgram, outputOf, workerd } from "../support/engines.ts";
import { folderFor, fromRoot } from "../support/folder.ts";
import { GLOBALS, MSGPACKR } from "../support/internals/cli.ts";
import { data, LOSSLESS, packOf } from "../support/packs.ts";
import { generations, textOf } from "../support/pipelines.ts";
import { MODULE } from "../support/readme.ts";
import { packages, without } from "../support/required.ts";
import { difference, golden, modelBytes, packBytes } from "../support/sessions.ts";

const root = fromRoot("");

function run(cwd: string, command: string, ...args: string[]): string {
  const { status, stdout, stderr } = spawnSync(command, args, { cwd, encoding: "utf8" });
  if (status !== 0) throw new Error(`${command} ${args.join(" ")}: exit ${status}\n${stdout}${stderr}`);
  return stdout;
}

/** A project with only the package. */
const folder = folderFor(t);
const project = join(folder, "project");
const own = join(project, "node_modules/eigenlora");
const [{ filename }] = JSON.parse(
  run(root, "npm", "pack", "--json", "--ignore-scripts", "--pack-destination", folder),
) as [{ filename: string }];
await mkdir(project);
await writeFile(join(project, "package.json"), '{"type":"module","private":true}');
// Offline: nothing has to be fetched.
run(project, "npm", "install", "--offline", "--no-audit", "--no-fund", join(folder, filename));
const installed = await readdir(join(project, "node_modules"));

/** Shared by all tests here: each opens a window of its own. */
const browser = noChromium ? undefined! : await launch(t);

t.test("an install brings the package alone, and that packs", async (t) => {
  t.same(
    installed.filter((name) => !name.startsWith(".")),
    ["eigenlora"],
  );
  t.notOk((await readdir(own)).includes("node_modules"), "nothing inside it either");
  const { scripts } = JSON.parse(await readFile(join(own, "package.json"), "utf8"));
  t.notMatch(Object.keys(scripts).join(" "), /install/);
  const bundled = await readFile(join(own, MSGPACKR), "utf8");
  t.match(bundled, /Copyright \(c\) 2020 Kris Zyp/, "its licence");
  t.notMatch(bundled, /\bimport\b.*"|\brequire\(|msgpackr-extract/, "and nothing that it would load");

  const adapter = data("adapters/own-seed/debtags-role");
  run(project, "npx", "--offline", "eigenlora", "pack", adapter, "-o", "one.eigen", "--k", "4");
  await writeFile(
    join(project, "build.js"),
    `import { openPack } from "eigenlora";
import { buildPack } from "eigenlora/build";
import { readAdapters } from "eigenlora/node";
const { chunks } = await buildPack(await readAdapters([process.argv[2]]), { select: { kind: "k", k: 4 } });
console.log([...(await openPack(new Uint8Array(Buffer.concat(chunks)))).tasks.keys()].join());
process.exit();`,
  );
  t.equal(run(project, process.execPath, "build.js", adapter), "debtags-role\n");
});

const NODE16 = [ts.ModuleKind.Node16, ts.ModuleResolutionKind.Node16] as const;
const BUNDLER = [ts.ModuleKind.ESNext, ts.ModuleResolutionKind.Bundler] as const;

/** Compilers of users: how they find modules, and their libraries in addition to the language's. */
const COMPILERS: readonly { name: string; how: typeof NODE16 | typeof BUNDLER; lib?: string; types?: string }[] = [
  { name: "node16", how: NODE16 },
  { name: "node16, @types/node", how: NODE16, types: "node" },
  { name: "node16, DOM", how: NODE16, lib: "lib.dom.d.ts" },
  { name: "bundler", how: BUNDLER },
  { name: "bundler, DOM", how: BUNDLER, lib: "lib.dom.d.ts" },
];

/** Parses each file once for each way to find modules. */
const parsed = new Map<string, ts.SourceFile | undefined>();
function hostOf(options: ts.CompilerOptions): ts.CompilerHost {
  const host = ts.createCompilerHost(options);
  const { getSourceFile } = host;
  host.getSourceFile = (file, ...rest) => {
    const key = `${options.module} ${file}`;
    if (!parsed.has(key)) parsed.set(key, getSourceFile.call(host, file, ...rest));
    return parsed.get(key);
  };
  return host;
}

t.test("the types of every subpath compile, with skipLibCheck off", async (t) => {
  const { exports } = JSON.parse(await readFile(join(own, "package.json"), "utf8"));
  const subpaths = Object.keys(exports).filter((key) => exports[key].types !== undefined);
  t.ok(subpaths.length >= 10);
  const all = join(project, "all.ts");
  const names = subpaths.map((subpath) => subpath.replace(".", "eigenlora"));
  await writeFile(all, names.map((name, i) => `export * as _${i} from "${name}";\n`).join(""));
  for (const { name, how, lib, types } of COMPILERS) {
    const [module, moduleResolution] = how;
    const options: ts.CompilerOptions = {
      ...{ module, moduleResolution, target: ts.ScriptTarget.ES2022, lib: ["lib.es2022.d.ts", ...(lib ? [lib] : [])] },
      ...{ strict: true, exactOptionalPropertyTypes: true, noUncheckedIndexedAccess: true, noEmit: true },
      // TypeScript's own libraries need no check here.
      ...{ skipLibCheck: false, skipDefaultLibCheck: true },
      ...{ types: types ? [types] : [], typeRoots: [join(root, "node_modules/@types")] },
    };
    const host = hostOf(options);
    const found = ts.getPreEmitDiagnostics(ts.createProgram([all], options, host));
    t.same(
      found.map((one) => ts.formatDiagnostic(one, host)),
      [],
      name,
    );
  }
  for (const subpath of subpaths) {
    const { types } = exports[subpath] as { types: string };
    const options: ts.CompilerOptions = { noLib: true, types: [], module: ts.ModuleKind.Node16 };
    const program = ts.createProgram([join(own, types)], options, hostOf(options));
    const uses = program
      .getSourceFiles()
      .some(({ text }) => /\b(AbortSignal|Blob|CryptoKey|URL|WebAssembly)\b[^.]*;/.test(text));
    if (uses) t.ok(program.getSourceFile(join(own, GLOBALS)), `${subpath}, by itself`);
  }
});

t.test(
  "eigenlora/browser without a bundler, under a strict Content-Security-Policy",
  { skip: noChromium },
  async (t) => {
    const site = join(folder, "site");
    const ort = join(root, "node_modules/onnxruntime-web/dist");
    await mkdir(site);
    await copyFile(join(own, "dist/browser.js"), join(site, "eigenlora.js"));
    await copyFile(join(ort, "ort.wasm.bundle.min.mjs"), join(site, "ort.js"));
    await copyFile(join(ort, "ort-wasm-simd-threaded.wasm"), join(site, "ort-wasm-simd-threaded.wasm"));
    const local = (code: string): string =>
      code.replace(/"eigenlora(\/onnxruntime)?"/g, '"./eigenlora.js"').replace('"onnxruntime-web/wasm"', '"./ort.js"');
    await writeFile(join(site, "example.js"), local(MODULE));
    await writeFile(
      join(site, "page.js"),
      `import { createRuntime, openPack } from "./eigenlora.js";
import { main } from "./example.js";
async function switching() {
  const pack = await openPack("small.eigen");
  const weight = ({ out, in: inputs }) => ({ dtype: "f32", shape: [out, inputs], data: new Float32Array(out * inputs).fill(0.5) });
  const base = new Map(pack.modules.map((module) => [module.name + ".weight", weight(module)]));
  const runtime = await createRuntime(pack, { base });
  for (const task of [...pack.tasks.keys(), null]) await runtime.switchTask(task);
  return { backend: runtime.backend, identical: [...base.values()].every(({ data }) => data.every((value) => value === 0.5)) };
}
const told = (error) => error.message;
globalThis.answer = Promise.all([switching(), main("model.onnx").catch(told)]);`,
    );
    await writeFile(join(site, "model.onnx"), modelBytes("torchscript"));
    await writeFile(join(site, "tasks.eigen"), await packBytes(["adapters"], "base"));
    const adapters = ["adapters/own-seed/debtags-game", "adapters/own-seed/debtags-role"];
    const small = await packOf(adapters, { select: { kind: "k", k: 8 }, step: 0.05 }, (module) =>
      module.includes("layer.0."),
    );
    await writeFile(join(site, "small.eigen"), small.bytes);

    const answer = async (policy: string): Promise<[{ backend: string; identical: boolean }, number[] | string]> => {
      const meta = `<meta http-equiv="Content-Security-Policy" content="${policy}">`;
      await writeFile(join(site, "index.html"), `<!doctype html>${meta}<script type="module" src="page.js"></script>`);
      // Sends the policy as a header too.
      const server = await serveFolder(site);
      t.teardown(() => server.close());
      const page = await browser.newPage();
      t.teardown(() => page.close());
      page.on("pageerror", (error) => t.fail(`uncaught in the page: ${error.stack}`));
      await page.goto(server.url);
      return (await answerOf(page)) as never;
    };
    const [runtime, logits] = await answer(
      "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; connect-src 'self'",
    );
    t.match(runtime, { backend: /^wasm/, identical: true });
    t.ok(difference(logits as number[], golden("base", "two")) < 1e-5, "PEFT's logits");

    const [plain, refused] = await answer("default-src 'none'; script-src 'self'; connect-src 'self'");
    t.match(plain, { backend: "js", identical: true }, "weights of one's own need no WebAssembly");
    t.match(refused, /onnxruntime cannot load the model.*WebAssembly/, "onnxruntime-web does");
  },
);

/** Test sentences that PEFT is sure about, by row. */
const SURE = { "debtags-role": 15, "debtags-game": 7 };

/** A project with the package and the other packages that the apps of examples/ need. */
const apps = join(folder, "apps");

/** Makes that project. @returns what its tasks answer */
async function prepare(): Promise<{ task: string; text: string; label: string }[]> {
  await cp(project, apps, { recursive: true });
  const modules = join(apps, "node_modules");
  await mkdir(join(modules, "@huggingface"));
  for (const name of ["@huggingface/tokenizers", "onnxruntime-node", "onnxruntime-web", "onnxruntime-common"])
    await symlink(join(root, "node_modules", name), join(modules, name));
  const files = join(apps, "files");
  await mkdir(files);
  await symlink(data("minilm/model_fp16.onnx"), join(files, "model.onnx"));
  for (const file of ["tokenizer.json", "tokenizer_config.json"])
    await symlink(data(`minilm/${file}`), join(files, file));
  const { bytes } = await packOf(
    Object.keys(SURE).map((task) => `adapters/own-seed/${task}`),
    LOSSLESS,
  );
  await writeFile(join(files, "tasks.eigen"), bytes);
  const read = async (path: string) => JSON.parse(await readFile(data(path), "utf8"));
  const reference = (await read("reference/predictions.json"))["own-seed"];
  return Promise.all(
    Object.entries(SURE).map(async ([task, row]) => {
      const { test, labels } = await read(`tasks/${task}.json`);
      return { task, text: test[row][0], label: labels[reference[task].predictions[row]] };
    }),
  );
}

/** Copies an app of examples/ into that project, or into a folder of it. @returns its folder */
async function copyExample(name: string, place = ".", as = name): Promise<string> {
  const app = join(apps, as);
  await cp(join(root, "examples", name), app, { recursive: true });
  await cp(join(apps, "files"), join(app, place), { recursive: true });
  return app;
}

const cases = await prepare();

for (const [name, extra] of [["node"], ["transformers", "@huggingface/transformers"]] as const) {
  const from = extra && packages(extra);
  t.test(`examples/${name}`, { skip: from !== undefined && without(name, from) }, async (t) => {
    const app = await copyExample(name);
    if (from) {
      await symlink(from, join(apps, "node_modules", extra));
      const model = join(app, "models/my-model");
      await mkdir(join(model, "onnx"), { recursive: true });
      await cp(join(apps, "files/model.onnx"), join(model, "onnx/model_fp16.onnx"));
      for (const file of ["config.json", "tokenizer.json", "tokenizer_config.json"])
        await cp(data(`minilm/${file}`), join(model, file));
    }
    for (const { task, text, label } of cases) {
      const lines = run(app, process.execPath, "main.js", text).split("\n");
      t.equal(lines[0], text);
      t.match(
        lines.find((line) => line.startsWith(`${task}: `)),
        new RegExp(`^${task}: ${label}\\b`),
        text,
      );
    }
  });
}

/** The pack of the apps. */
const packOfApp = () => readFile(join(apps, "files/tasks.eigen"));

t.test("examples/workerd", { skip: noProgram("workerd") }, async (t) => {
  const app = await copyExample("workerd");
  const bytes = await packOfApp();
  const tasks = [...(await openPack(new Uint8Array(bytes))).tasks.keys()];
  const { name, in: width } = (await openPack(new Uint8Array(bytes))).modules[0]!;
  const rows = [0, 1].map((row) => Array.from({ length: width }, (_, i) => ((i * 7 + row) % 11) - 5));
  const ask = [...tasks.map((task) => ({ task, module: name, x: rows })), { task: "no", module: name, x: rows }];
  await writeFile(
    join(app, "main.js"),
    `import app from "./worker.js";
import bytes from "./tasks.eigen";
const object = { size: bytes.byteLength, etag: "1", arrayBuffer: async () => bytes };
const env = { PACKS: { get: async (key) => (key === "tasks.eigen" ? object : null), head: async () => object } };
export default {
  async test() {
    for (const body of ${JSON.stringify(ask)}) {
      const request = new Request("http://worker/", { method: "POST", body: JSON.stringify(body) });
      const response = await app.fetch(request, env);
      console.log(JSON.stringify({ status: response.status, ...(await response.json()) }));
    }
  },
};`,
  );
  await bundleWorker(app, "main.js");
  await copyFile(join(own, "dist/wasm/simd.wasm"), join(app, "simd.wasm"));
  const text = await workerd(app, ["worker.bundle.js", "simd.wasm", "tasks.eigen"]);
  const answers = text.split("\n").flatMap((line) => (line.startsWith("{") ? [JSON.parse(line)] : []));
  t.equal(answers.length, ask.length, text.slice(0, 2000));
  const runtime = await createRuntime(await openPack(new Uint8Array(bytes)), { backend: "js" });
  for (const [i, task] of tasks.entries()) {
    await runtime.switchTask(task);
    const x = { dtype: "f32", shape: [2, width], data: new Uint8Array(Float32Array.from(rows.flat()).buffer) } as const;
    const out = answers[i].y[0].length;
    const y = { dtype: "f32", shape: [2, out], data: new Uint8Array(8 * out), byteOffset: 0 } as const;
    await runtime.apply(name, { ...x, byteOffset: 0 }, y);
    t.ok(difference(answers[i].y.flat(), new Float32Array(y.data.buffer)) < 1e-5, task);
  }
  t.match(answers.at(-1), { status: 404, tasks });
});

t.test("examples/react-native", { skip: noProgram("hermes", "hermesc", "metro") }, async (t) => {
  // Kept apart from the other apps: Metro looks through all of its project.
  const native = join(folder, "native");
  const app = join(native, "app");
  await cp(join(root, "examples/react-native"), app, { recursive: true });
  await cp(own, join(native, "node_modules/eigenlora"), { recursive: true });
  await writeFile(join(native, "package.json"), '{ "name": "native", "version": "1.0.0" }');
  const { bytes } = await packOf(
    Object.keys(SURE).map((task) => `adapters/own-seed/${task}`),
    { select: { kind: "k", k: 2 } },
    (module) => module.includes("layer.0.attention.self.query"),
  );
  await writeFile(
    join(app, "main.js"),
    `import { openTasks } from "./tasks.js";
const base64 = "${Buffer.from(bytes).toString("base64")}";
const files = {
  size: async () => ${bytes.length},
  // A library that gives base64 of a part: whole groups of four digits around it.
  async read(uri, offset, length) {
    const { fromBase64 } = require("eigenlora/react-native");
    return fromBase64(base64).slice(offset, offset + length);
  },
};
openTasks(files, "file:///tasks.eigen")
  .then(async (pack) => {
    for (const task of pack.tasks.keys()) await pack.load(task);
    print(JSON.stringify([pack.name, [...pack.tasks.keys()], pack.reads.requests]));
  })
  .catch((error) => print(error.stack));`,
  );
  const out = await outputOf("hermes", "-w", await metro(native, "app/main.js"));
  t.same(JSON.parse(out), ["file:///tasks.eigen", Object.keys(SURE).sort(), 4]);

  // The app's own code: modules of React Native and Expo are empty here, since only devices run them.
  for (const name of [
    "react",
    "react-native",
    "expo-asset",
    "expo-file-system/legacy",
    "onnxruntime-react-native",
    "@react-native/assets-registry/registry",
  ]) {
    await mkdir(join(native, "node_modules", name), { recursive: true });
    await writeFile(join(native, "node_modules", name, "index.js"), "");
  }
  await mkdir(join(app, "assets"));
  await writeFile(join(app, "assets/tasks.eigen"), bytes);
  await writeFile(join(app, "assets/model.onnx"), "a model");
  const whole = await metro(native, "app/App.js");
  await outputOf("hermesc", "-w", "-emit-binary", "-out", join(app, "app.hbc"), whole);
  t.match(await readFile(whole, "utf8"), /Choose a task/, "the app is a bundle that Hermes compiles");
});

/** Keeps what the page's output says, one text after another. */
const keepSaid = (page: Page): Promise<unknown> =>
  page.addInitScript(() => {
    const said: string[] = [];
    Object.assign(globalThis, { said });
    const keep = () => said.push(document.querySelector("output")?.textContent ?? "");
    new MutationObserver(keep).observe(document, { childList: true, characterData: true, subtree: true });
  });

/**
 * Chooses each task in an app's page, which says how much of the model has come.
 * @returns the scripts that it loaded
 */
async function tryPage(t: Test, url: string, route?: (page: Page) => Promise<unknown>): Promise<string[]> {
  const page = await browser.newPage();
  t.teardown(() => page.close());
  const scripts: string[] = [];
  page.on("request", (request) => {
    const { pathname } = new URL(request.url());
    if (/\.m?js$/.test(pathname)) scripts.push(pathname);
  });
  page.on("pageerror", (error) => t.fail(`uncaught in the page: ${error.stack}`));
  await route?.(page);
  await keepSaid(page);
  await page.goto(url);
  await page.locator("output", { hasNotText: "Loading" }).waitFor();
  const said = await page.evaluate(() => (globalThis as unknown as { said: string[] }).said);
  t.ok(said.includes("Loading model.onnx: 100 %"), [...new Set(said)].join(", "));
  for (const { task, text, label } of cases) {
    await page.getByLabel("Sentence").fill(text);
    await page.getByLabel("Task").selectOption(task);
    await page.locator("output").getByText(label, { exact: true }).waitFor();
    t.pass(`${task}: ${label}`);
  }
  return scripts;
}

const VITE = packages("vite/bin/vite.js");
const noVite = without("vite", VITE);
t.test("examples/vite", { skip: noChromium || noVite }, async (t) => {
  const app = await copyExample("vite", "public");
  run(app, process.execPath, VITE, "build", "--logLevel", "error");
  const server = await serveFolder(join(app, "dist"));
  t.teardown(() => server.close());
  const scripts = await tryPage(t, server.url);
  t.ok(scripts.length > 1 && scripts.length <= 15, `${scripts.length} scripts`);
  const sizes = await Promise.all(
    scripts.map(async (path) => gzipSync(await readFile(join(app, "dist", path))).length),
  );
  const bytes = sizes.reduce((sum, size) => sum + size, 0);
  t.ok(bytes <= 140e3, `${bytes} bytes of scripts after gzip, onnxruntime's among them`);
});

t.test("examples/worker", { skip: noChromium || noVite }, async (t) => {
  const app = await copyExample("worker", "public");
  run(app, process.execPath, VITE, "build", "--logLevel", "error");
  const server = await serveFolder(join(app, "dist"));
  t.teardown(() => server.close());
  await tryPage(t, server.url);
});

t.test("examples/html, with what the CDN has", { skip: noChromium }, async (t) => {
  const server = await serveFolder(await copyExample("html"));
  t.teardown(() => server.close());
  await tryPage(t, server.url, (page) => beTheCdn(t, page, join(apps, "node_modules")));
});

t.test("examples/html, with the three files from its own server", { skip: noChromium }, async (t) => {
  const app = await copyExample("html", ".", "html-alone");
  const page = await readFile(join(app, "index.html"), "utf8");
  const addresses = [...page.matchAll(/https:\/\/cdn\.jsdelivr\.net\/npm\/((?:@[^/]+\/)?[^@/]+)@[^/]+\/([^"]*)/g)];
  t.equal(addresses.length, 3);
  let changed = page;
  for (const [address, name, path] of addresses) {
    const file = path!.split("/").at(-1)!;
    await copyFile(join(apps, "node_modules", name!, path!), join(app, file));
    changed = changed.replace(address, `./${file}`);
  }
  const wasm = "ort-wasm-simd-threaded.wasm";
  await copyFile(join(apps, "node_modules/onnxruntime-web/dist", wasm), join(app, wasm));
  await writeFile(join(app, "index.html"), changed);
  const server = await serveFolder(app);
  t.teardown(() => server.close());
  await tryPage(t, server.url, (page) => page.route(/^https:/, (route) => route.abort()));
});

const TRANSFORMERS = "@huggingface/transformers";
const noTransformers = without("transformers", packages(TRANSFORMERS));
t.test("examples/llm, in the terminal and as a page", { skip: noTransformers || noChromium || noVite }, async (t) => {
  const app = join(apps, "llm");
  await cp(join(root, "examples/llm"), app, { recursive: true });
  const linked = join(apps, "node_modules", TRANSFORMERS);
  if (!existsSync(linked)) await symlink(packages(TRANSFORMERS), linked);
  const model = join(app, "public/models/smollm2");
  await mkdir(join(model, "onnx"), { recursive: true });
  for (const file of ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"])
    await cp(data(`decoder/${file}`), join(model, file));
  await cp(data("decoder/onnx/model.onnx"), join(model, "onnx/model_q4.onnx"));
  const { bytes } = await packOf(["decoder/adapters/upper", "decoder/adapters/lower"], LOSSLESS);
  await writeFile(join(app, "public/tasks.eigen"), bytes);
  await writeFile(join(app, "public/prompts.json"), JSON.stringify({ upper: "{input}", lower: "{input}" }));
  const goldens = await generations("decoder/goldens.json");
  const prompt = "x = 3;";
  // The text goes on after the goldens' twelve tokens.
  const begins = (skill: string): string =>
    textOf(goldens.find((g) => g.task === skill && g.prompt === prompt)!.ids, 1);
  t.ok(run(app, process.execPath, "main.js", "lower", ...prompt.split(" ")).startsWith(begins("lower")));
  t.match(run(app, process.execPath, "main.js", "middle", "word"), /^The skills are lower, upper\.|upper, lower\./);

  run(app, process.execPath, VITE, "build", "--logLevel", "error");
  const server = await serveFolder(join(app, "dist"));
  t.teardown(() => server.close());
  const page = await browser.newPage();
  t.teardown(() => page.close());
  page.setDefaultTimeout(120_000);
  page.on("pageerror", (error) => t.fail(`uncaught in the page: ${error.stack}`));
  await beTheCdn(t, page, packages());
  await page.goto(server.url);
  await page.locator("#cost", { hasText: "Switched" }).waitFor();
  await page.getByLabel("Words").fill(prompt);
  for (const skill of ["lower", "upper"]) {
    await page.getByLabel("Skill").selectOption(skill);
    await page.locator("#answer").getByText(begins(skill)).waitFor();
    t.match(await page.locator("#cost").textContent(), /^Switched in .* ms, with [01] requests\.$/);
  }
});
