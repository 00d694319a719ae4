/**
 * Material of test/support/engine-case.js: a pack of two adapters of the tiny model with components in few bits, the
 * model's weights, and the comparison of an engine's outcome with Node's js backend.
 */
import { readFile, writeFile } from "node:fs/promises";
import { join } from "node:path";
import type { Test } from "tap";
import type { Material, Outcome, State } from "./engine-case.js";
import { projectWith } from "./engines.ts";
import { openHost } from "./internals/runtime.ts";
import { data, packOf } from "./packs.ts";

const hexOf = (bytes: Uint8Array): string => Buffer.from(bytes).toString("hex");

async function material(): Promise<Material> {
  const path = data("sessions/base.safetensors");
  const host = await openHost(path);
  const adapters = ["sessions/adapters/two", "sessions/adapters/three"];
  // One layer only: engines without a compiler need seconds for 500 switches of more.
  const only = (module: string): boolean => module.includes("layer.0.");
  const { bytes } = await packOf(adapters, { select: { kind: "k", k: 4 }, base: host }, only);
  const base = [];
  for (const { name, shape } of host.list()) {
    if (!only(name) && !name.includes("classifier")) continue;
    const { data, byteOffset } = await host.read(name);
    const length = 4 * shape.reduce((product, size) => product * size, 1);
    base.push({ name, shape: [...shape], hex: hexOf((data as Uint8Array).subarray(byteOffset, byteOffset + length)) });
  }
  await host.close?.();
  return { pack: hexOf(bytes), base, safetensors: hexOf(await readFile(path)), tasks: ["two", "three"] };
}

/**
 * Names of weights, by state, that differ from Node's js backend by more than `most` of its largest element; 0: in a
 * bit.
 */
function differing(js: Outcome, states: readonly State[], most: number): string[] {
  const values = (hex: string): Float32Array => new Float32Array(new Uint8Array(Buffer.from(hex, "hex")).buffer);
  return js.states.flatMap((expected, i) =>
    Object.entries(expected).flatMap(([name, hex]) => {
      const found = states[i]?.[name] ?? "";
      if (found === hex) return [];
      const [a, b] = [values(found), values(hex)];
      const largest = b.reduce((sum, value) => Math.max(sum, Math.abs(value)), 0);
      const near = a.length === b.length && b.every((value, k) => Math.abs(value - a[k]!) <= most * largest);
      return near && most > 0 ? [] : [`${i} ${name}`];
    }),
  );
}

/** Backends that may round otherwise: relaxed instructions, and devices, fuse a product and a sum. */
const NEAR = /relaxed|webgpu/;

/** Installs the package with the case and its material in a project, and judges outcomes of engines. */
export async function prepareCase(t: Test): Promise<{
  project: string;
  given: Material;
  engineCase: typeof import("./engine-case.js")["engineCase"];
  check(t: Test, found: Outcome[], backends: readonly (string | RegExp)[]): void;
}> {
  const project = await projectWith(t);
  const given = await material();
  await writeFile(join(project, "material.js"), `export default ${JSON.stringify(given)};`);
  const { engineCase } = (await import(join(project, "engine-case.js"))) as typeof import("./engine-case.js");
  const js = await engineCase(given, { backend: "js" });
  const check = (t: Test, found: Outcome[], backends: readonly (string | RegExp)[]): void => {
    t.match(
      found.map(({ backend }) => backend),
      backends,
    );
    t.equal(found.length, backends.length);
    for (const { backend, states, requests = 4, refused, back, fromFile } of found) {
      const most = NEAR.test(backend) ? 1e-6 : 0;
      const how = most > 0 ? "within 1e-6" : "to the bit";
      t.same(differing(js, states, most), [], `${backend}: equal to Node's js ${how}`);
      t.equal(requests, 4, "window, directory with bases, one per task");
      t.match(refused, /^TaskError: no task "no such task"/);
      t.ok(back, `${backend}: back to the bit`);
      t.ok(fromFile, `${backend}: the same from a file`);
    }
  };
  return { project, given, engineCase, check };
}

/**
 * Code that prints the case's outcomes on these backends as one line.
 * @param options `{ gpu: true }` for WebGPU
 * @param url of the pack, if it is not to be opened from its bytes
 */
export const caseCode = (options: readonly object[], print: string, url?: string): string => `
import { engineCase } from "./engine-case.js";
import material from "./material.js";
import { webgpu } from "eigenlora/webgpu";
const run = async () => {
  const found = [];
  for (const { gpu, ...options } of ${JSON.stringify(options)}) {
    const given = gpu ? { backend: webgpu() } : options;
    found.push(await engineCase(material, given, options.backend ? 500 : 2, ${JSON.stringify(url)}));
  }
  return JSON.stringify(found);
};
run().then(${print}, (error) => ${print}("failed: " + error + "\\n" + error.stack));
`;
/** Parses the line with the outcomes. @throws Error with the output otherwise */
export function outcomesOf(text: string): Outcome[] {
  const line = text.split("\n").find((one) => one.startsWith("["));
  if (line === undefined) throw new Error(text.slice(0, 4000));
  return JSON.parse(line) as Outcome[];
}

/** Every build, by name. */
export const WASM: readonly object[] = ["scalar", "simd", "relaxed-simd"].map((variant) => ({
  backend: "wasm",
  wasm: { variant },
}));
