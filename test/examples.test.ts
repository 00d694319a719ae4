/**
 * Examples in doc comments and code blocks in documents: each compiles against the built package, and runs on the test data where it
 * needs nothing that is absent (a GPU, transformers.js). `test/examples/values.js` holds the values that examples assume.
 */
import { execFile } from "node:child_process";
import { readdirSync, readFileSync } from "node:fs";
import { cp, mkdir, mkdtemp, rm, symlink, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import { openPack } from "eigenlora";
import { buildPack, encodeTaskFile, readGguf } from "eigenlora/build";
import { readAdapters } from "eigenlora/node";
import t from "tap";
import ts from "typescript";
import { concat, data, LOSSLESS } from "./packs.ts";
import { surface } from "./tools/api.js";
import { SIGNER } from "./vectors/valid.js";

const root = fileURLToPath(new URL("..", import.meta.url));
const folder = join(root, "test/examples");
const values = join(folder, "values.js");

interface Example {
  /** Place of the example. */
  readonly place: string;
  /** Names that come from the example's own subpath, although others export them too. */
  readonly own?: ReadonlyMap<string, string>;
  readonly code: string;
}

/** Code blocks of a Markdown text in JavaScript or TypeScript. */
function blocks(text: string): { line: number; code: string }[] {
  return [...text.matchAll(/^```(?:js|ts)\n([\s\S]*?)^```$/gm)].map(({ 1: code, index }) => ({
    line: text.slice(0, index).split("\n").length + 1,
    code: code!,
  }));
}

const exported = new Map<string, string>();
const examples: Example[] = [];
for (const { subpath, name, examples: tags } of surface().exports) {
  if (!exported.has(name)) exported.set(name, subpath);
  const own = new Map([[name, subpath]]);
  tags.forEach((text, i) => {
    const fenced = blocks(`${text}\n`).map(({ code }) => code);
    examples.push({ place: `${subpath} ${name} ${i + 1}`, own, code: fenced.length > 0 ? fenced.join("\n") : text });
  });
}
const pages = readdirSync(join(root, "docs")).filter((file) => file.endsWith(".md") && file !== "api-report.md");
for (const page of ["README.md", ...pages.map((file) => `docs/${file}`)]) {
  for (const { line, code } of blocks(readFileSync(join(root, page), "utf8"))) {
    examples.push({ place: `${page}:${line}`, code });
  }
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

const modules = examples.map((example, i) => ({ ...example, ...moduleOf(example), file: join(folder, `${i}.ts`) }));

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

/** Puts a repository into the Hub's cache, as if it had been downloaded. @param files of the folder by path in the repository */
async function cacheOfHub(place: string, name: string, files: ReadonlyMap<string, string>): Promise<void> {
  const store = join(place, "hf/hub", `models--${name.replace("/", "--")}`);
  const commit = "a".repeat(40);
  await mkdir(join(store, "refs"), { recursive: true });
  await writeFile(join(store, "refs/main"), commit);
  for (const [path, file] of files) await cp(join(place, file), join(store, "snapshots", commit, path));
}

/** Makes a folder with the files that examples name. */
async function workplace(): Promise<string> {
  const place = await mkdtemp(join(tmpdir(), "eigenlora-examples-"));
  await mkdir(join(place, "node_modules"));
  await symlink(root, join(place, "node_modules/eigenlora"));
  for (const name of ["onnxruntime-node", "onnxruntime-web", "onnxruntime-common"]) {
    await symlink(join(root, "node_modules", name), join(place, "node_modules", name));
  }
  const copies = { "debtags-role": "two", sst2: "three", cola: "three", sentiment: "two", topics: "five" };
  const gain = { accuracy: 0.9, accuracy_head_only: 0.5 };
  for (const [id, name] of Object.entries(copies)) {
    for (const hub of ["my-adapters", "hub", "adapters"]) {
      await cp(data(`sessions/adapters/${name}`), join(place, hub, id), { recursive: true });
    }
  }
  await writeFile(
    join(place, "scores.json"),
    JSON.stringify(Object.fromEntries(Object.keys(copies).map((id) => [id, gain]))),
  );
  const base = data("sessions/base.safetensors");
  const { chunks } = await buildPack(await readAdapters([join(place, "my-adapters")]), { ...LOSSLESS, base });
  await writeFile(join(place, "tasks.eigen"), concat(chunks));
  const pack = await openPack(join(place, "tasks.eigen"));
  const mine = { id: "mine", adapterBytes: 0, metadata: {} };
  await writeFile(join(place, "mine.eigentask"), encodeTaskFile(mine, pack.basisId, await pack.stored("sst2")));
  await pack.close();
  await cp(fileURLToPath(new URL("vectors/valid/signed.eigen", import.meta.url)), join(place, "signed.eigen"));
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
  const skills = await readAdapters([data("seq2seq/adapters")]);
  const textToText = data("seq2seq/base.safetensors");
  await writeFile(
    join(place, "skills.eigen"),
    concat((await buildPack(skills, { ...LOSSLESS, base: textToText })).chunks),
  );
  await cp(data("seq2seq/onnx/encoder_model.onnx"), join(place, "encoder.onnx"));
  await cp(data("seq2seq/decoder.onnx"), join(place, "decoder.onnx"));
  const spoken = await readAdapters([data("decoder/adapters")]);
  await writeFile(join(place, "llm.eigen"), concat((await buildPack(spoken, LOSSLESS)).chunks));
  await cp(data("decoder/onnx/model.onnx"), join(place, "llm.onnx"));
  await cp(data("sessions/torchscript.onnx"), join(place, "model.onnx"));
  await cp(data("sessions/base.safetensors"), join(place, "model.safetensors"));
  await cacheOfHub(place, "org/name", new Map([["tasks.eigen", "tasks.eigen"]]));
  const model = ["onnx/model.onnx", "onnx/model_q4.onnx"].map((path) => [path, "model.onnx"] as const);
  await cacheOfHub(place, "org/model", new Map(model));
  return place;
}

t.test("examples run", async (t) => {
  const place = await workplace();
  t.teardown(() => rm(place, { recursive: true, maxRetries: 5, retryDelay: 200 }));
  const listed = [];
  for (const [i, { text, names }] of modules.entries()) {
    const file = join(place, `${i}.mjs`);
    await writeFile(
      file,
      ts.transpileModule(text, { compilerOptions: { target: ts.ScriptTarget.ES2022, module: ts.ModuleKind.ESNext } })
        .outputText,
    );
    listed.push({ file, names });
  }
  await writeFile(join(place, "examples.json"), JSON.stringify(listed));
  const env = { ...process.env, HF_HOME: join(place, "hf"), HF_HUB_OFFLINE: "1" };
  const { stdout } = await promisify(execFile)(process.execPath, [join(folder, "run.js")], { cwd: place, env });
  const results = JSON.parse(stdout.trimEnd().split("\n").at(-1)!) as { error?: string; absent?: string }[];
  for (const [i, { error, absent }] of results.entries()) {
    const { place, packages, code } = modules[i]!;
    const lacking =
      absent ??
      packages.find((name) => /^@(huggingface|tensorflow|jax-js|dr\.pogodin)\/|\.wasm$/.test(name)) ??
      /webgpu(?="\])/.exec(code)?.[0];
    if (lacking) t.pass(place, { skip: `${lacking} is not here` });
    else t.equal(error, undefined, place, { code });
  }
});
