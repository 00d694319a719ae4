/** Work in a fresh process, memory of a process, temporary folders, and clocks. */
import { spawnSync } from "node:child_process";
import { mkdtemp, readFile, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";

/** Exits at once, since threads of a runtime would keep the process alive. */
const CALL = `const [module, name, args] = process.argv.slice(1);
console.log(JSON.stringify(await (await import(module))[name](...JSON.parse(args))));
process.exit();`;

/**
 * Calls an exported function of a module in a process of its own, with garbage collection exposed.
 * @param {URL} module
 * @param {string} name
 * @param {readonly (string | number)[]} args
 * @returns {any} the result, by way of JSON
 * @throws Error where it failed; the process has printed the reason on stderr
 */
export function inFreshProcess(module, name, args) {
  const { status, stdout } = spawnSync(
    process.execPath,
    ["--expose-gc", "--input-type=module", "-e", CALL, module.href, name, JSON.stringify(args)],
    {
      encoding: "utf8",
      stdio: ["ignore", "pipe", "inherit"],
    },
  );
  if (status !== 0) throw new Error(`${name}(${args.join(", ")}) failed`);
  return JSON.parse(stdout.trim().split("\n").at(-1) ?? "");
}

/**
 * Runs `eigenlora` in a process of its own.
 * @param {readonly string[]} args
 * @returns {any} its report
 * @throws Error where it failed
 */
export function command(...args) {
  const main = fileURLToPath(new URL("../../dist/src/cli/main.js", import.meta.url));
  const how = { encoding: /** @type {const} */ ("utf8"), maxBuffer: 2 ** 28 };
  const { status, stdout } = spawnSync(process.execPath, [main, ...args, "--json"], {
    ...how,
    stdio: ["ignore", "pipe", "inherit"],
  });
  if (status !== 0) throw new Error(`${args.join(" ")} failed`);
  return JSON.parse(stdout);
}

/** Memory of this process after full collections. */
export async function settledMemory() {
  for (let i = 0; i < 5; i++) {
    globalThis.gc?.();
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
  return { ...process.memoryUsage(), rss: (await procStatus("VmRSS")) ?? process.memoryUsage().rss };
}

/** Peak resident memory in bytes. */
export const peakMemory = async () => (await procStatus("VmHWM")) ?? process.resourceUsage().maxRSS * 1024;

/** Bytes, where there is /proc. @param {string} field */
async function procStatus(field) {
  const status = await readFile("/proc/self/status", "utf8").catch(() => "");
  const kilobytes = new RegExp(`${field}:\\s+(\\d+)`).exec(status)?.[1];
  return kilobytes ? Number(kilobytes) * 1024 : undefined;
}

/**
 * Makes a folder for some work and removes it afterwards.
 * @template T
 * @param {(folder: string) => Promise<T>} work
 */
export async function inScratch(work) {
  const folder = await mkdtemp(join(tmpdir(), "eigenlora-bench-"));
  try {
    return await work(folder);
  } finally {
    await rm(folder, { recursive: true });
  }
}

/** CPU milliseconds of this process so far, those that the system spent for it too. */
export function cpu() {
  const { user, system } = process.cpuUsage();
  return (user + system) / 1000;
}

/**
 * Milliseconds of some work, by the clock and by all threads' CPU time, which other load on the machine lengthens
 * least.
 * @template T
 * @param {() => T | Promise<T>} work
 */
export async function clocked(work) {
  const [used, started] = [cpu(), performance.now()];
  const result = await work();
  return { ms: performance.now() - started, cpu: cpu() - used, result };
}
