import { spawnSync } from "node:child_process";
import { readdirSync } from "node:fs";
import { cp, mkdir, readFile, writeFile } from "node:fs/promises";
import { join, posix } from "node:path";
import { gzipSync } from "node:zlib";
import { build, type PluginBuild } from "esbuild";
import t from "tap";
import { fromRoot } from "../support/folder.ts";
import { WEBGPU } from "../support/internals/cli.ts";

const root = fromRoot("");
const manifest = JSON.parse(await readFile(fromRoot("package.json"), "utf8"));

/**
 * Budgets of README, in bytes after gzip; 1 kB = 1000 B. 3.1 kB of WASM decode coded sections, and are loaded with the
 * first one.
 */
const BUDGET = { js: 22_200, wasm: 12_300, url: 4_500 };

/**
 * Files loaded only when they are used: the kernels, the kinds of bases, their fingerprints and refusals, HTTP ranges,
 * names of the Hub, the reader of task files, hashes and keys, the other backends, the unfolded modes, parameters in
 * addition to terms, progress.
 */
const LAZY =
  /^#wasm\/|\/(load-base|open-base|mismatch|url-source|hub-name|task-file|coded|part|trust|kind|js|webgpu|terms|merge|parameters|progress)\.js$/;

/** The WebGPU half with its shaders, on top of what every app loads. */
const WEBGPU_BUDGET = 9_200;

/**
 * Files that a session loads only when they are used: WebGPU, mode "folded", terms beside cores, training, biases that
 * the model lacks, layers that are not linear, `apply`, trust, URLs, files of another kind, progress, tokenizers.
 */
const SESSION_LAZY =
  /^#wasm\/|\/(trust|kind|url-source|task-file|coded|part|packed|skeleton|forms|js|dequantize|replaceable|rows|caches|webgpu|device|create|terms|training|apply|progress|tokens)\.js$/;

/** Budget of an app that runs an ONNX model: the runtime, the protobuf, the graph surgery, the session. */
const SESSION_BUDGET = 56_030;

/** Budget of `eigenlora/cache`, with its shared part of the run time. */
const CACHE_BUDGET = 4_100;

/**
 * Bundles one minified file for a browser; modules that `apart` matches are left out.
 * @param setup more of the bundler
 */
async function bundle(
  code: string,
  apart: RegExp,
  setup?: (build: PluginBuild) => void,
): Promise<{ text: string; gzip: number }> {
  const { outputFiles } = await build({
    stdin: { contents: code, resolveDir: root },
    bundle: true,
    minify: true,
    format: "esm",
    platform: "browser",
    write: false,
    logLevel: "silent",
    plugins: [
      {
        name: "apart",
        setup(build) {
          build.onResolve({ filter: apart }, ({ path }) => ({ path, external: true }));
          setup?.(build);
        },
      },
    ],
  });
  return { text: outputFiles[0]!.text, gzip: gzipSync(outputFiles[0]!.contents, { level: 9 }).length };
}

t.test("the run-time bundle for a browser keeps its budget", async (t) => {
  const code = 'import { openPack, createRuntime } from "eigenlora"; globalThis.x = [openPack, createRuntime];';
  const js = await bundle(code, LAZY);
  const all = await bundle(code, /^#wasm\//);
  let wasm = 0;
  for (const name of ["scalar", "simd", "relaxed", "coded"]) {
    wasm += gzipSync(await readFile(new URL(`../../dist/wasm/${name}.wasm`, import.meta.url)), { level: 9 }).length;
  }
  t.comment(
    `JS ${js.gzip} B of ${BUDGET.js}; ${all.gzip} B with what is loaded on demand; WASM ${wasm} B of ${BUDGET.wasm}`,
  );
  t.ok(js.gzip <= BUDGET.js, `${js.gzip} B of JS`);
  const urls = (await bundle(code, new RegExp(LAZY.source.replace("url-source|", "")))).gzip - js.gzip;
  t.ok(urls > 1000 && urls <= BUDGET.url, `${urls} B to read by URL`);
  t.ok(wasm <= BUDGET.wasm, `${wasm} B of WASM, the three builds and the decoder together`);
  t.notMatch(all.text, /node:|readAdapters|extractModule/, "neither Node nor the build half");
  t.notMatch(js.text, /AGFzbQ/, "no kernel is compiled or even loaded before it is chosen");
});

t.test("the WebGPU half is loaded by itself and keeps its budget", async (t) => {
  const code = `import { createWebgpuBackend } from "./${WEBGPU}"; globalThis.x = createWebgpuBackend;`;
  const { text, gzip } = await bundle(code, /^#wasm\//);
  t.comment(`${gzip} B of ${WEBGPU_BUDGET}, shaders included`);
  t.ok(gzip <= WEBGPU_BUDGET, `${gzip} B`);
  t.match(text, /fold_in_place/, "the shaders are in it");
});

/** Budget of a React Native app that opens a pack from bytes: the runtime and its js backend, in code for Hermes. */
const HERMES_BUDGET = 30_480;

/**
 * Files loaded there when they are used: addresses, files of weights, missing parameters of a base, trust, task files,
 * unfolded modes.
 */
const HERMES_LAZY = /\/(load-base|open-base|mismatch|url-source|task-file|part|trust|kind|terms|progress)\.js$/;

/** Makes the exchanges that package.json's "react-native" asks for. */
function asMetro(build: PluginBuild): void {
  const replaced = manifest["react-native"] as Record<string, string>;
  build.onResolve({ filter: /\/(wasm|webgpu|coded-wasm)\.js$/ }, ({ path, resolveDir }) => ({
    path: posix.join(root, replaced[`./${posix.relative(root, posix.join(resolveDir, path))}`]!),
  }));
}

t.test("a bundle for Hermes keeps its budget", async (t) => {
  const code =
    'import { openPack, createRuntime } from "eigenlora"; import { fromBase64 } from "eigenlora/react-native"; globalThis.x = [fromBase64, openPack, createRuntime];';
  const { text, gzip } = await bundle(code, HERMES_LAZY, asMetro);
  t.comment(`${gzip} B of ${HERMES_BUDGET}`);
  t.ok(gzip <= HERMES_BUDGET, `${gzip} B`);
  t.match(text, /decodes|expand/, "the js backend is in it");
  t.notMatch(text, /WebAssembly|createShaderModule/, "and no other");
});

t.test("React Native without package exports finds every subpath", (t) => {
  const replaced = manifest["react-native"] as Record<string, string>;
  for (const [subpath, target] of Object.entries(manifest.exports as Record<string, { default: string }>)) {
    if (subpath === ".") t.equal(manifest.main, target.default);
    else if (!/^\.\/(node|browser|workerd|wasm\/.*|package\.json)$/.test(subpath))
      t.equal(replaced[subpath], target.default, subpath);
  }
  t.end();
});

t.test("a session's bundle keeps its budget and brings no runtime of its own", async (t) => {
  const code =
    'import { openPack } from "eigenlora"; import { createEigenSession } from "eigenlora/onnxruntime"; globalThis.x = [openPack, createEigenSession];';
  const { text, gzip } = await bundle(code, SESSION_LAZY);
  t.comment(`${gzip} B of JS of ${SESSION_BUDGET}`);
  t.ok(gzip <= SESSION_BUDGET, `${gzip} B of JS`);
  t.notOk(/"node:|ort-wasm/.test(text), "neither Node nor a runtime");
});

t.test("a cache is portable, and no app pays for it that does not use it", async (t) => {
  const code = 'import { cachedSource, cacheStore } from "eigenlora/cache"; globalThis.x = [cachedSource, cacheStore];';
  const { text, gzip } = await bundle(code, LAZY);
  t.comment(`${gzip} B of ${CACHE_BUDGET}`);
  t.ok(gzip <= CACHE_BUDGET, `${gzip} B`);
  t.notMatch(text, /"node:/);
});

/** Budget of `eigenlora/browser`: all of it, shaders, kernels and the trainer too. */
const BROWSER_BUDGET = 198_700;

t.test("the file for pages without a bundler imports nothing and keeps its budget", async (t) => {
  const bytes = await readFile(fromRoot("dist/browser.js"));
  const gzip = gzipSync(bytes, { level: 9 }).length;
  t.comment(`${gzip} B of ${BROWSER_BUDGET}`);
  t.ok(gzip <= BROWSER_BUDGET, `${gzip} B`);
  const { metafile } = await build({
    entryPoints: [fromRoot("dist/browser.js")],
    bundle: true,
    format: "esm",
    write: false,
    metafile: true,
    logLevel: "silent",
    plugins: [
      {
        name: "nothing else",
        setup: (b) =>
          b.onResolve({ filter: /./ }, ({ path, kind }) =>
            kind === "entry-point" ? undefined : { path, external: true },
          ),
      },
    ],
  });
  t.same(
    Object.values(metafile.inputs).flatMap(({ imports }) => imports.map(({ path }) => path)),
    [],
    "no import, static or dynamic",
  );
  t.match(bytes.toString("utf8", 0, 200), /Apache-2\.0/, "its licence");
});

t.test("what is published", async (t) => {
  const { stdout } = spawnSync("npm", ["pack", "--dry-run", "--json", "--ignore-scripts"], {
    cwd: root,
    encoding: "utf8",
  });
  const [{ files, unpackedSize }] = JSON.parse(stdout) as [
    { files: { path: string; size: number }[]; unpackedSize: number },
  ];
  const paths = files.map((f) => f.path);
  for (const path of [
    "dist/src/index.js",
    "dist/src/cli/main.js",
    "dist/wasm/simd.wasm",
    "dist/browser.js",
    "SPEC.md",
    "docs/README.md",
    "docs/memory.svg",
    "README.md",
    "LICENSE",
  ]) {
    t.ok(paths.includes(path), path);
  }
  t.same(
    paths.filter((p) => /^(test|benchmarks(?!\/research\/results\/paper)|src|assembly|docs\/api)\/|\.map$/.test(p)),
    [],
    "no sources, maps, tests or data",
  );
  t.ok(unpackedSize <= 5_150_000, `${unpackedSize} bytes`);
  for (const path of paths.filter((p) => p.endsWith(".d.ts"))) {
    const text = await readFile(new URL(`../../${path}`, import.meta.url), "utf8");
    t.notMatch(text, /@webgpu\/types|\bGPUDevice\b|from "(onnxruntime|@huggingface|@bufbuild|msgpackr)/, path);
  }
  // Offline only the package is there.
  const pages = paths.filter((path) => path.endsWith(".md"));
  t.ok(pages.length > 30, `${pages.length} pages`);
  for (const page of pages) {
    const text = (await readFile(new URL(`../../${page}`, import.meta.url), "utf8")).replace(/^```[\s\S]*?^```/gm, "");
    // The image in a link, and the link around it.
    const links = [...text.matchAll(/\]\(([^)\s]+)\)/g)].map(([, target]) => target!.split("#")[0]!);
    const dead = links
      .filter((link) => link !== "" && !/^[a-z]+:/.test(link))
      .map((link) => posix.join(posix.dirname(page), link));
    t.same(
      dead.filter((path) => !paths.includes(path)),
      [],
      page,
    );
  }
  const examples = files.filter(({ path }) => path.startsWith("examples/"));
  const size = examples.reduce((sum, one) => sum + one.size, 0);
  t.ok(size <= 200_000, `examples take ${size} bytes`);
});

t.test("no archive without what is built", async (t) => {
  const clone = t.testdir();
  for (const file of ["package.json", ".npmrc", "README.md"]) await cp(join(root, file), join(clone, file));
  // An npm that started the tests would hand its settings on.
  const env = Object.fromEntries(Object.entries(process.env).filter(([name]) => !/^npm_/i.test(name)));
  const pack = () => spawnSync("npm", ["pack", "--json"], { cwd: clone, encoding: "utf8", env });
  const { status, stderr } = pack();
  t.not(status, 0);
  t.match(stderr, /ENOENT.*dist/);
  t.same(readdirSync(clone).sort(), [".npmrc", "README.md", "package.json"]);
  await mkdir(join(clone, "dist/src"), { recursive: true });
  await writeFile(join(clone, "dist/src/index.js"), "");
  for (const _ of ["first", "again"]) {
    const [{ files }] = JSON.parse(pack().stdout) as [{ files: { path: string }[] }];
    t.same(files.map(({ path }) => path).sort(), ["README.md", "dist/src/index.js", "package.json"]);
  }
  t.same(readdirSync(join(clone, "dist")).sort(), [`eigenlora-${manifest.version}.tgz`, "src"]);
});

t.test("the archive of test vectors", async (t) => {
  const { stdout } = spawnSync("npm", ["pack", "./test/vectors", "--dry-run", "--json", "--ignore-scripts"], {
    cwd: root,
    encoding: "utf8",
  });
  const [{ filename, files }] = JSON.parse(stdout) as [{ filename: string; files: { path: string }[] }];
  t.equal(filename, `eigenlora-vectors-${manifest.version}.tgz`);
  const packed = files.map(({ path }) => path);
  const { vectors } = await import("../vectors/make.js");
  t.same(
    [...vectors().keys(), "README.md", "make.js", "reader.py"].filter((path: string) => !packed.includes(path)),
    [],
  );
});

t.test("names the package exports", async (t) => {
  const { VERSION, ...runtime } = await import("eigenlora");
  t.equal(VERSION, manifest.version);
  t.same(Object.keys(runtime).sort(), [
    "AdapterError",
    "BackendError",
    "BaseMismatchError",
    "EigenLoraError",
    "FormatError",
    "Pack",
    "Runtime",
    "SourceError",
    "TaskError",
    "TrustError",
    "createRuntime",
    "openPack",
    "readTensor",
  ]);
  t.ok("buildPack" in (await import("eigenlora/build")));
  t.same(Object.keys(await import("eigenlora/cache")).sort(), ["cacheStore", "cachedSource"]);
  t.same(Object.keys(await import("eigenlora/react-native")).sort(), ["fileSource", "fromBase64", "toBase64"]);
  t.same(Object.keys(await import("eigenlora/react-native/onnxruntime")), ["createEigenSession"]);
  t.same(Object.keys(await import("eigenlora/workerd")).sort(), ["keptPack", "r2Source"]);
  t.ok("openOnnxHost" in (await import("eigenlora/onnx")));
  t.same(Object.keys(await import("eigenlora/onnxruntime")).sort(), [
    "createEigenSession",
    "createEigenSessions",
    "createEngine",
  ]);
  t.same(Object.keys(await import("eigenlora/train")).sort(), [
    ...["Trainer", "createTrainer", "distill", "packByAnswers", "tasksByAnswers"],
  ]);
  t.same(Object.keys(await import("eigenlora/transformers")).sort(), ["AttachedPack", "attachPack"]);
  t.same(Object.keys(await import("eigenlora/tfjs")), ["tfjsHost"]);
  t.same(Object.keys(await import("eigenlora/jax")), ["jaxHost"]);
  t.notOk("dependencies" in manifest, "no run-time dependency");
});
