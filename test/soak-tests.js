/**
 * Tests that take a case of each kind in `npm test`, with the whole of their matrix: every model and mode on each build with software
 * WebGPU, every backend in a worker, gradients of language models, more switches, bits and mutants. Twelve minutes.
 *
 * usage: node test/soak-tests.js [NAME...]      tests by name, such as session-gpu. Default: all of them
 */
import { spawnSync } from "node:child_process";
import { fileURLToPath } from "node:url";

const TESTS = [
  "session-gpu",
  "session-chromium",
  "learn-chromium",
  "learn-llm",
  "learn-joined",
  "backends-chromium",
  "page",
  "weights",
  "trust",
  "peft-mutants",
  "pairs",
  "hub",
  "by-answers",
];

const names = process.argv.slice(2);
const unknown = names.filter((name) => !TESTS.includes(name));
if (unknown.length > 0) throw new RangeError(`${unknown.join(", ")}: expected some of ${TESTS.join(", ")}`);
const root = fileURLToPath(new URL("..", import.meta.url));
const { status } = spawnSync(
  process.execPath,
  [
    "node_modules/tap/dist/esm/run.mjs",
    "--timeout=1800",
    ...(names.length > 0 ? names : TESTS).map((name) => `test/${name}.test.ts`),
  ],
  { cwd: root, stdio: "inherit", env: { ...process.env, EIGENLORA_SOAK: "1" } },
);
process.exitCode = status ?? 1;
