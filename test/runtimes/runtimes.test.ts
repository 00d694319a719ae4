import { execFile } from "node:child_process";
import { cp, mkdir, writeFile } from "node:fs/promises";
import { basename, join } from "node:path";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import t, { type Test } from "tap";
import { answerOf, bundle, noChromium, openPage } from "../support/browser.ts";
import { folderFor } from "../support/folder.ts";
import { packOf } from "../support/packs.ts";
import { serve } from "../support/range-server.ts";
import { packages, without } from "../support/required.ts";

/**
 * The built package, by its name, in every runtime on this machine. EIGENLORA_RUNTIMES names a folder with `node_modules/.bin` where
 * Deno, Bun and newer Nodes may be (`npm install deno bun node@22` there). A missing runtime is skipped by name, and fails when
 * EIGENLORA_REQUIRE lists it.
 */
const run = promisify(execFile);
const root = fileURLToPath(new URL("../..", import.meta.url));
const bin = (name: string): string => packages(join(".bin", name));

const { bytes } = await packOf(
  ["adapters/own-seed/debtags-game", "adapters/own-seed/debtags-role"],
  { select: { kind: "k", k: 8 } },
  (m) => m.includes("layer.0."),
);
const files = new Map([["tasks.eigen", bytes as Uint8Array]]);
const server = await serve(files);
t.teardown(() => server.close());

/** A project that has installed the package: node_modules/eigenlora, and this test's script. */
const project = folderFor(t);
await mkdir(join(project, "node_modules", "eigenlora"), { recursive: true });
for (const part of ["dist", "package.json"])
  await cp(join(root, part), join(project, "node_modules/eigenlora", part), { recursive: true });
for (const script of ["test/support/smoke.js", "test/support/smoke-main.js"])
  await cp(join(root, script), join(project, basename(script)));
await writeFile(join(project, "package.json"), '{"type":"module"}');

interface Smoke {
  backend: string;
  sums: number[];
  identical: boolean;
  requests: number;
}

/** This Node's outcome, which the others must equal. */
const expected = JSON.parse(
  (await run(process.execPath, ["smoke-main.js", server.url("tasks.eigen")], { cwd: project })).stdout,
) as Smoke[];

function check(t: Test, found: Smoke[]): void {
  t.same(
    found.map((f) => f.backend.split(" ")[0]),
    ["js", "wasm"],
  );
  for (const [i, { sums, identical, requests }] of found.entries()) {
    t.ok(identical, "back to the bit");
    t.equal(requests, 4, "window, directory with bases, one per task");
    sums.forEach((sum, k) => t.ok(Math.abs(sum / expected[i]!.sums[k]! - 1) < 1e-6, `${found[i]!.backend}: ${sum}`));
  }
}

const commands: [string, string, string[]][] = [
  ["node", process.execPath, []],
  ["node22", bin("node"), []],
  ["deno", bin("deno"), ["run", "--allow-all", "--node-modules-dir=manual"]],
  ["bun", bin("bun"), ["run"]],
];
for (const [name, command, args] of commands) {
  t.test(name, { skip: command !== process.execPath && without(name, command) }, async (t) => {
    const { stdout } = await run(command, [...args, "smoke-main.js", server.url("tasks.eigen")], { cwd: project });
    const found = JSON.parse(stdout) as Smoke[];
    check(t, found);
    t.comment(`${name}: ${found.map((f) => f.backend).join(", ")}`);
  });
}

for (const where of ["window", "worker"]) {
  t.test(`chromium, ${where}`, { skip: noChromium }, async (t) => {
    const smoke = 'import { smokeAll } from "./smoke.js";';
    const code =
      where === "window"
        ? `${smoke} globalThis.answer = smokeAll("/tasks.eigen");`
        : `globalThis.answer = new Promise((resolve, reject) => {
            const worker = new Worker("/worker.js", { type: "module" });
            worker.onmessage = ({ data }) => (typeof data === "string" ? reject(new Error(data)) : resolve(data));
            worker.onerror = ({ message }) => reject(new Error(message));
          });`;
    const page = new Map(files);
    page.set("page.js", await bundle(code, { resolveDir: project }));
    const worker = `${smoke} smokeAll("/tasks.eigen").then(postMessage, (error) => postMessage(error.stack));`;
    page.set("worker.js", await bundle(worker, { resolveDir: project }));
    const found = (await answerOf(await openPage(t, page))) as Smoke[];
    check(t, found);
    t.comment(found.map((f) => f.backend).join(", "));
  });
}
