/**
 * `npm run build`: makes dist of the sources, and compiles only what has changed.
 *
 * A kernel or a module follows from its source, the compilers and their options alone. Each result is kept by a hash of
 * these, so that an incremental build cannot differ from a clean one. Files of dist that no source asks for are
 * removed; pages that `npm run page` has built there stay. Types are checked by `npm run types`, not here: a module is
 * compiled without the others.
 */
import { createHash } from "node:crypto";
import { chmodSync, mkdirSync, readdirSync, readFileSync, renameSync, rmdirSync, rmSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import * as esbuild from "esbuild";
import { compileKernels, kernelFiles } from "./assembly/kernels.mjs";
import { shaderFiles } from "./kernels/build.mjs";

const root = fileURLToPath(new URL(".", import.meta.url));
const dist = join(root, "dist");
const CACHE = join(root, "node_modules/.cache/eigenlora/build.json");

/** Folders of dist that `npm run page` fills. */
const PAGES = new Set(["page", "page-llm"]);

/** @param {string} path from the root */
const read = (path) => readFileSync(join(root, path), "utf8");

/** @param {readonly string[]} texts */
const hashOf = (...texts) => createHash("sha256").update(JSON.stringify(texts)).digest("hex");

/** What every result follows from beside its source: options, and the compilers, whose versions the lock file has. */
const tools = hashOf(...["build.mjs", "assembly/kernels.mjs", "tsconfig.json", "package-lock.json"].map(read));

/** Results of the last build by hash. @type {Record<string, any>} */
let kept = {};
try {
  kept = JSON.parse(readFileSync(CACHE, "utf8"));
} catch {
  // The first build, or one that was stopped: all is made again.
}
/** Those of this build. @type {Record<string, any>} */
const used = {};

/** The kernels, which import each other: any change compiles all. @returns {Promise<Record<string, Uint8Array>>} */
async function kernels() {
  const sources = readdirSync(join(root, "assembly"))
    .filter((name) => name.endsWith(".ts"))
    .map((name) => `${name}\n${read(`assembly/${name}`)}`);
  const key = hashOf(tools, ...sources);
  /** @type {Record<string, string>} base64 by name */
  let binaries = kept[key];
  if (!binaries) {
    const made = Object.entries(await compileKernels());
    binaries = Object.fromEntries(made.map(([name, bytes]) => [name, Buffer.from(bytes).toString("base64")]));
  }
  used[key] = binaries;
  return Object.fromEntries(Object.entries(binaries).map(([name, text]) => [name, Buffer.from(text, "base64")]));
}

/** Modules and declarations of src and bindings. @returns {Promise<[path: string, content: string][]>} */
async function modules() {
  const sources = ["src", "bindings"].flatMap((folder) =>
    readdirSync(join(root, folder), { recursive: true, encoding: "utf8" })
      .filter((file) => file.endsWith(".ts"))
      .map((file) => `${folder}/${file.replaceAll("\\", "/")}`),
  );
  const keys = new Map(sources.map((file) => [file, hashOf(tools, file, read(file))]));
  const changed = sources.filter((file) => !kept[/** @type {string} */ (keys.get(file))]);
  const made = changed.length > 0 ? await emit(changed) : new Map();
  return sources.flatMap((file) => {
    const key = /** @type {string} */ (keys.get(file));
    /** @type {{ js: string, types: string }} */
    const { js, types } = (used[key] = kept[key] ?? made.get(file));
    return /** @type {[string, string][]} */ ([
      [file.replace(/ts$/, "js"), js],
      [file.replace(/ts$/, "d.ts"), types],
    ]);
  });
}

/**
 * Compiles modules, each as if the others were not there, which `isolatedDeclarations` allows.
 * @param {readonly string[]} files
 */
async function emit(files) {
  const { default: ts } = await import("typescript");
  const { compilerOptions } = ts.readConfigFile(join(root, "tsconfig.json"), ts.sys.readFile).config;
  const { options } = ts.convertCompilerOptionsFromJson(
    {
      ...compilerOptions,
      ...{
        noEmit: false,
        isolatedDeclarations: true,
        isolatedModules: true,
        noResolve: true,
        noCheck: true,
        types: [],
      },
      // Tells which names of members are symbols.
      lib: ["es2022", "esnext.disposable"],
    },
    root,
  );
  const program = ts.createProgram(
    files.map((file) => join(root, file)),
    options,
  );
  /** @type {Map<string, { js: string, types: string }>} */
  const made = new Map(files.map((file) => [file, { js: "", types: "" }]));
  const { diagnostics } = program.emit(undefined, (path, text) => {
    const [, name, kind] = /** @type {RegExpExecArray} */ (/^(.*)(\.d\.ts|\.js)$/.exec(path.slice(dist.length + 1)));
    const one = /** @type {{ js: string, types: string }} */ (made.get(`${name}.ts`));
    one[kind === ".js" ? "js" : "types"] = text;
  });
  const wrong = [...program.getSyntacticDiagnostics(), ...diagnostics];
  if (wrong.length > 0) {
    const host = { getCanonicalFileName: String, getCurrentDirectory: () => root, getNewLine: () => "\n" };
    throw new Error(ts.formatDiagnostics(wrong, host));
  }
  return made;
}

/**
 * One module of a module and what it imports.
 * @param {string} entry path from the root
 * @param {esbuild.BuildOptions} [options]
 */
async function bundle(entry, options) {
  const { outputFiles } = await esbuild.build({
    entryPoints: [join(root, entry)],
    ...{ bundle: true, format: "esm", target: "es2022", logLevel: "warning", absWorkingDir: root, write: false },
    minifyWhitespace: true,
    ...options,
  });
  return /** @type {esbuild.OutputFile[]} */ (outputFiles)[0].text;
}

/** commander is CommonJS, and requires modules of Node. */
const REQUIRE = "import { createRequire } from 'node:module'; const require = createRequire(import.meta.url);";

const LICENCE = "/*! EigenLoRA Edge, Apache-2.0 */";

/**
 * The viewer of packs as one file: its script and its styles stand in it, and its policy allows them by their hashes.
 */
async function viewer() {
  const script = await bundle("examples/viewer/main.js", { minify: true, banner: { js: LICENCE } });
  const { code: style } = await esbuild.transform(read("examples/viewer/viewer.css"), { loader: "css", minify: true });
  /** @param {string} text */
  const allowed = (text) => `'sha256-${createHash("sha256").update(text).digest("base64")}'`;
  return read("examples/viewer/index.html")
    .replace("SCRIPT_HASH", () => allowed(script))
    .replace("STYLE_HASH", () => allowed(style))
    .replace("<style>STYLE</style>", () => `<style>${style}</style>`)
    .replace('<script type="module">SCRIPT</script>', () => `<script type="module">${script}</script>`);
}

/** Writes what differs in dist. @param {Iterable<readonly [path: string, content: string | Uint8Array]>} files */
function write(files) {
  for (const [path, content] of files) {
    const file = join(dist, path);
    const bytes = Buffer.from(content);
    try {
      if (readFileSync(file).equals(bytes)) continue;
    } catch {
      mkdirSync(dirname(file), { recursive: true });
    }
    writeFileSync(file, bytes);
  }
}

/**
 * Removes what is not of this build, and folders that are empty then.
 * @param {string} folder from dist, with a slash behind it
 */
function prune(folder = "") {
  for (const entry of readdirSync(join(dist, folder), { withFileTypes: true })) {
    const path = `${folder}${entry.name}`;
    if (entry.isDirectory()) PAGES.has(path) || prune(`${path}/`);
    else if (!files.has(path)) rmSync(join(dist, path));
  }
  if (readdirSync(join(dist, folder)).length === 0) rmdirSync(join(dist, folder));
}

/** Contents by path in dist. @type {Map<string, string | Uint8Array>} */
const files = new Map([...kernelFiles(await kernels()), ...shaderFiles(), ...(await modules())]);
// What is used of a library, with its licence, so that the package has no dependency.
files.set("src/format/msgpackr.js", await bundle("src/format/msgpackr.ts"));
files.set("src/cli/commander.js", await bundle("src/cli/commander.ts", { platform: "node", banner: { js: REQUIRE } }));
write(files);
// For pages without a bundler.
files.set("browser.js", await bundle("dist/src/browser.js", { minify: true, banner: { js: LICENCE } }));
files.set("viewer.html", await viewer());
write(files);
prune();
// For use from a checkout; npm does that for installs.
chmodSync(join(dist, "src/cli/main.js"), 0o755);
mkdirSync(dirname(CACHE), { recursive: true });
writeFileSync(`${CACHE}.new`, JSON.stringify(used));
renameSync(`${CACHE}.new`, CACHE);
