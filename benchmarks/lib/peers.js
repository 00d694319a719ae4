/**
 * Peers in Python (`PYTHON` or python3): scripts under benchmarks/peers. A peer that does not run is named with the
 * reason.
 */
import { spawn, spawnSync } from "node:child_process";
import { fileURLToPath } from "node:url";

const PYTHON = process.env.PYTHON ?? "python3";

/** Where a module comes from, if not from the package that has its name. @type {Record<string, string>} */
const PACKAGES = { lorashare: "lorashare==0.1.3", vlora: "vlora-dev==1.0.0" };

/**
 * @typedef {{ first: any, ask(question: object): Promise<any>, stop(): void }} Running `first`: what it printed when it
 *   started
 * @typedef {{ reason: string }} Missing
 */

/**
 * Runs a peer on one thread. It prints one JSON object.
 * @param {string} script
 * @param {readonly string[]} args
 * @param {string} [input] what it reads
 * @returns {{ figures: any } | Missing}
 */
export function python(script, args, input) {
  const { status, stdout, stderr, error } = spawnSync(PYTHON, [pathOf(script), ...args], {
    encoding: "utf8",
    env: environment(1),
    input,
    maxBuffer: 2 ** 28,
  });
  if (error) return { reason: `${error.message}; set PYTHON` };
  return status === 0 ? { figures: JSON.parse(stdout.trim().split("\n").at(-1) ?? "") } : { reason: whyFailed(stderr) };
}

/**
 * Starts a peer that stays: it prints one JSON object, then answers each line with another one. Its work and ours can
 * take turns this way.
 * @param {string} script
 * @param {readonly string[]} args
 * @param {{ threads?: number }} [options] threads: Infinity for as many as its libraries take by themselves. Default: 1
 * @returns {Promise<Running | Missing>}
 */
export async function startPython(script, args = [], { threads = 1 } = {}) {
  const child = spawn(PYTHON, [pathOf(script), ...args], { env: environment(threads) });
  let [out, errors] = ["", ""];
  /** @type {((line: string | undefined) => void)[]} */
  const waiting = [];
  child.stderr.on("data", (chunk) => (errors += chunk));
  child.stdout.on("data", (chunk) => {
    out += chunk;
    for (let end = out.indexOf("\n"); end >= 0; end = out.indexOf("\n")) {
      waiting.shift()?.(out.slice(0, end));
      out = out.slice(end + 1);
    }
  });
  child.on("error", (error) => (errors = `${error.message}; set PYTHON`));
  child.on("close", () => waiting.splice(0).forEach((give) => give(undefined)));
  /** @returns {Promise<string | undefined>} */
  const line = () => new Promise((resolve) => waiting.push(resolve));
  const first = await line();
  if (first === undefined) return { reason: whyFailed(errors) };
  return {
    first: JSON.parse(first),
    async ask(question) {
      child.stdin.write(`${JSON.stringify(question)}\n`);
      const answer = await line();
      if (answer === undefined) throw new Error(`${script}: ${whyFailed(errors)}`);
      return JSON.parse(answer);
    },
    stop: () => child.stdin.end(),
  };
}

/** Modules that Python lacks; undefined where it can import all. @param {readonly string[]} modules */
export function missing(modules) {
  const { status, stderr, error } = spawnSync(PYTHON, ["-c", `import ${modules.join(", ")}`], { encoding: "utf8" });
  if (error) return `${error.message}; set PYTHON`;
  return status === 0 ? undefined : whyFailed(stderr);
}

/**
 * A line of the report on a peer: its version, or why it did not run.
 * @param {string} name
 * @param {Running | Missing | { figures: any }} peer
 * @returns {import("./report.js").Peer}
 */
export function peerLine(name, peer) {
  if ("reason" in peer) return { name, reason: peer.reason };
  return { name, version: ("figures" in peer ? peer.figures : peer.first).version };
}

/** @param {string} script */
const pathOf = (script) => fileURLToPath(new URL(`../peers/${script}`, import.meta.url));

/**
 * Drops settings that keep OpenBLAS from the best code for this processor.
 * @param {number} threads
 * @returns {NodeJS.ProcessEnv}
 */
const environment = (threads) => ({
  ...process.env,
  OPENBLAS_CORETYPE: undefined,
  OPENBLAS_L2_SIZE: undefined,
  ...(Number.isFinite(threads) ? { OMP_NUM_THREADS: `${threads}`, MKL_NUM_THREADS: `${threads}` } : {}),
});

/** @param {string} stderr of a peer */
function whyFailed(stderr) {
  const module = /No module named '([^']+)'/.exec(stderr)?.[1];
  if (module) return `pip install ${PACKAGES[module] ?? "torch peft transformers"}`;
  return stderr.trim().split("\n").at(-1) || "failed";
}
