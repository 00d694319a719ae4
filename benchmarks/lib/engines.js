/** Engines that benchmarks start as processes: their scripts, and their cost measured from outside. */
import { spawn } from "node:child_process";
import { existsSync } from "node:fs";
import { cp, mkdir, readFile, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { build } from "esbuild";
import { bundleForHermes } from "./metro.js";

const tools = join(process.env.EIGENLORA_RUNTIMES ?? "", "node_modules");
const root = fileURLToPath(new URL("../..", import.meta.url));
const HERMES = join(tools, "hermes-engine-cli/linux64-bin/hermes");
const WORKERD = join(tools, ".bin/workerd");

/**
 * @typedef {{ backend: "js" | "wasm", mode: "folded" | "factors", switches: number }} Task switches: −1 opens nothing
 */

/** True if an engine is installed and has the backend. @param {string} engine @param {string} backend */
export const can = (engine, backend) =>
  engine === "node" || (engine === "hermes" ? backend === "js" && existsSync(HERMES) : existsSync(WORKERD));

/** A project with the package and a pack. @param {string} folder @param {Uint8Array} pack */
export async function prepare(folder, pack) {
  await mkdir(join(folder, "node_modules/eigenlora"), { recursive: true });
  for (const part of ["dist", "package.json"])
    await cp(join(root, part), join(folder, "node_modules/eigenlora", part), { recursive: true });
  await cp(join(root, "dist/wasm/simd.wasm"), join(folder, "simd.wasm"));
  await writeFile(join(folder, "package.json"), '{ "name": "app", "version": "1.0.0", "type": "module" }');
  await writeFile(join(folder, "pack.js"), `export default "${Buffer.from(pack).toString("base64")}";`);
}

/** The script of a task. @param {Task} task @param {string} kernel path of the compiled module, or nothing */
const script = ({ backend, mode, switches }, kernel) => `
import { createRuntime, openPack } from "eigenlora";
import { fromBase64 } from "eigenlora/react-native";
import base64 from "./pack.js";
${kernel && `import module from "${kernel}";`}
export async function main() {
  const bytes = fromBase64(base64);
  const base = new Map();
  if (${switches} < 0) return [bytes, ${mode === "folded"} && Array.from({ length: 12 }, () => new Float32Array(384 * 384).fill(0.01))];
  const pack = await openPack(bytes);
  for (const { name, out, in: inputs } of pack.modules)
    base.set(name + ".weight", { dtype: "f32", shape: [out, inputs], data: new Float32Array(out * inputs).fill(0.01) });
  const ids = [...pack.tasks.keys()];
  const options = { backend: "${backend}", mode: "${mode}"${kernel && ", wasm: { module }"}, ignore: ["classifier.weight", "classifier.bias"] };
  const runtime = await createRuntime(pack, ${mode === "folded"} ? { ...options, base, anyBase: true } : options);
  for (let i = 0; i < ${switches}; i++) await runtime.switchTask(ids[i % ids.length]);
  return [runtime, base];
}`;

/**
 * Commands that start each engine. @type {Record<string, (folder: string, task: Task) => Promise<[command: string,
 * ...args: string[]]>>}
 */
export const ENGINES = {
  async node(folder, task) {
    const file = join(folder, "node.mjs");
    await bundled(folder, `${script(task, "")}\nglobalThis.kept = await main();`, file);
    return [process.execPath, file];
  },
  async hermes(folder, task) {
    await writeFile(
      join(folder, "main.js"),
      `${script(task, "")}\nmain().then((kept) => (globalThis.kept = kept), print);`,
    );
    return [HERMES, "-w", "-O", await bundleForHermes(tools, folder, "main.js")];
  },
  async workerd(folder, task) {
    const kernel = task.backend === "wasm" ? "./simd.wasm" : "";
    const test = "export default { async test() { globalThis.kept = await main(); } };";
    await bundled(folder, `${script(task, kernel)}\n${test}`, join(folder, "worker.js"));
    const modules = `(name = "worker.js", esModule = embed "worker.js"), (name = "simd.wasm", wasm = embed "simd.wasm")`;
    const worker = `(compatibilityDate = "2026-11-01", modules = [${modules}])`;
    const config = `const config :Workerd.Config = (services = [(name = "main", worker = .main)]);\nconst main :Workerd.Worker = ${worker};`;
    await writeFile(join(folder, "config.capnp"), `using Workerd = import "/workerd/workerd.capnp";\n${config}\n`);
    return [WORKERD, "test", join(folder, "config.capnp")];
  },
};

/** @param {string} folder @param {string} contents @param {string} outfile */
const bundled = (folder, contents, outfile) =>
  build({
    stdin: { contents, resolveDir: folder },
    ...{
      outfile,
      bundle: true,
      format: "esm",
      platform: "browser",
      target: "es2022",
      external: ["*.wasm"],
      logLevel: "silent",
    },
  });

/** Seconds of a process, and its peak memory in megabytes. @param {string} command @param {string[]} args */
export async function measure(command, ...args) {
  const started = performance.now();
  const child = spawn(command, args, { stdio: ["ignore", "pipe", "pipe"] });
  let [peak, said] = [0, ""];
  child.stdout.on("data", (text) => (said += text));
  child.stderr.on("data", (text) => (said += text));
  const timer = setInterval(async () => {
    const status = await readFile(`/proc/${child.pid}/status`, "utf8").catch(() => "");
    peak = Math.max(peak, Number(/VmHWM:\s+(\d+)/.exec(status)?.[1] ?? 0) / 1000);
  }, 5);
  const code = await new Promise((resolve) => child.on("close", resolve));
  clearInterval(timer);
  if (code !== 0 || /Error/.test(said)) throw new Error(`${command}: ${said.slice(0, 500)}`);
  return { seconds: (performance.now() - started) / 1000, peak };
}
