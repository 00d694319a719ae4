// @ts-nocheck: it handles what no type describes
/**
 * Runs mutants through the package and compares accepted ones with what test/vectors/reader.py reads, from SPEC.md
 * alone.
 */
import { spawnSync } from "node:child_process";
import { fileURLToPath } from "node:url";
import { createRuntime, openPack } from "eigenlora";
import { python } from "../required.ts";
import { mutant } from "./make.js";

/** Most CPU seconds and megabytes that a mutant may take; all are a few kilobytes. */
const MOST = { seconds: 2, megabytes: 100 };

/** A base of distinct numbers for the modules and parameters that a pack changes: equal weights would be tied. */
function baseOf({ modules, tasks }) {
  const base = new Map();
  let filled = 0;
  const fill = (count) => Float32Array.from({ length: count }, () => Math.sin(++filled));
  for (const { name, out, in: inputs, layout, kernel } of modules) {
    const shapes = [
      [out, inputs],
      [inputs, out],
      kernel && [out, inputs / kernel.reduce((a, b) => a * b, 1), ...kernel],
      [inputs, out],
    ];
    base.set(`${name}.weight`, { dtype: "f32", shape: shapes[layout], data: fill(out * inputs) });
  }
  for (const { parameters } of tasks.values()) {
    for (const { name, role, shape, indices } of parameters) {
      // A base with so many rows would be larger than this machine.
      if (role === 0 || base.has(name) || (indices?.at(-1) ?? 0) > 1e5) continue;
      const rows = role === 3 ? [indices.at(-1) + 1, shape[1]] : shape;
      base.set(name, { dtype: "f32", shape: rows, data: fill(rows.reduce((a, b) => a * b, 1)) });
    }
  }
  return base;
}

/** Index of a weight's element in the base. */
const at = ({ layout, out, in: inputs }, o, i) => (layout === 1 || layout === 3 ? i * out + o : o * inputs + i);

/** Rows of W + ΔW in 64 bits, before DoRA's scale, with their bounds. */
function* rowsOf(modules, task, base) {
  for (const module of modules) {
    const { name, out, in: inputs } = module;
    const term = task?.terms.get(name);
    const before = base.get(`${name}.weight`).data;
    for (let o = 0; o < out; o++) {
      const row = Array.from(
        { length: inputs },
        (_, i) => before[at(module, o, i)] + (term?.delta[o * inputs + i] ?? 0),
      );
      const slack = row.map((value, i) => (term?.bound[o * inputs + i] ?? 0) + 2 ** -23 * Math.abs(value));
      const norm = Math.hypot(...row);
      const off = Math.hypot(...slack);
      const magnitude = term?.magnitude?.[o];
      const scale = magnitude === undefined ? 1 : norm > 0 ? magnitude / norm : 0;
      // Where a row almost cancels, its direction is known only within the bound of its elements.
      const cancels = magnitude !== undefined && off > 0.01 * norm;
      const share = magnitude === undefined ? 0 : Math.abs(magnitude) * ((2 * off) / norm + 2 ** -20);
      const bounds = slack.map((one) => (term ? one * Math.abs(scale) * (1 + 2 ** -10) + share + 2 ** -125 : 0));
      yield { module, o, row, scale, cancels, bounds };
    }
  }
}

/** Compares weights after a switch with W + ΔW. @returns the first difference, described */
function difference(runtime, modules, task, base) {
  for (const { module, o, row, scale, cancels, bounds } of rowsOf(modules, task, base)) {
    if (cancels) continue;
    const { name, out, in: inputs } = module;
    const found = runtime.weight(`${name}.weight`).data;
    const weights = new Float32Array(found.buffer, found.byteOffset, out * inputs);
    for (const [i, without] of row.entries()) {
      const expected = without * scale;
      const value = weights[at(module, o, i)];
      if (Number.isFinite(expected) && Math.abs(expected) > 3.4e38) continue;
      if (!(Math.abs(value - expected) <= bounds[i]))
        return `${name}[${o}, ${i}] is ${value}, expected ${expected} ± ${bounds[i]}`;
    }
  }
  return undefined;
}

/** True if SPEC.md 6.3 lets a reader refuse a task for its scales. */
function mayRefuse(modules, task, base) {
  return [...rowsOf(modules, task, base)].some(
    ({ scale, cancels }) => cancels || (scale !== 0 && !(Math.abs(scale) > 2 ** -125.9 && Math.abs(scale) < 3.4e38)),
  );
}

/** Values of a parameter as a task has them, by its role: saved, bias, difference of a bias, rows. */
function valuesOf({ role, shape, indices, values }, before) {
  if (role < 2) return values;
  if (role === 2) return values.map((value, i) => before[i] + value);
  const all = Float64Array.from(before);
  indices.forEach((index, row) => all.set(values.slice(row * shape[1], (row + 1) * shape[1]), index * shape[1]));
  return all;
}

/**
 * Compares heads, biases and token rows after a switch, those of other tasks too.
 * @returns the first difference, described
 */
function otherDifference(runtime, modules, task, before, given) {
  const brought = new Map(task?.parameters.map((one) => [one.name, one]));
  const weights = new Set(modules.map(({ name }) => `${name}.weight`));
  for (const name of new Set([...brought.keys(), ...before.keys()])) {
    const [one, pristine] = [brought.get(name), before.get(name)?.data];
    if (weights.has(name) || (!pristine && one.role !== 0)) continue;
    const { data, byteOffset } = one ? runtime.weight(name) : given.get(name);
    const expected = one ? valuesOf(one, pristine) : pristine;
    const found = new Float32Array(data.buffer, data.byteOffset + (byteOffset ?? 0), expected.length);
    for (const [i, value] of expected.entries()) {
      const size = Math.abs(value) + (one?.role === 2 ? Math.abs(pristine[i]) : 0);
      if (size > 3.4e38) continue;
      if (!(Math.abs(found[i] - value) <= (one ? 2 ** -22 * size + 2 ** -125 : 0)))
        return `${name}[${i}] is ${found[i]}, expected ${value}`;
    }
  }
  return undefined;
}

const READER = fileURLToPath(new URL("../../vectors/reader.py", import.meta.url));

/** Meaning of accepted files in 64 bits, in their order; null where a pack is too large to be folded. */
export function meaningsOf(files) {
  const base64 = (bytes) => bytes && Buffer.from(bytes).toString("base64");
  const input = files.map(({ bytes, known }) =>
    JSON.stringify({ pack: base64(known ?? bytes), task: known && base64(bytes) }),
  );
  const options = { input: input.join("\n"), encoding: "utf8", maxBuffer: 2 ** 30 };
  const { status, stdout, stderr } = spawnSync(python, ["-W", "ignore", READER, "--meanings"], options);
  if (status !== 0) throw new Error(stderr);
  return stdout
    .trim()
    .split("\n")
    .map((line) => {
      const truth = JSON.parse(line);
      if (!truth?.tasks) return truth;
      const tasks = Object.entries(truth.tasks).map(([id, { terms, parameters }]) => {
        return [id, { terms: new Map(Object.entries(terms)), parameters }];
      });
      return { modules: truth.modules, tasks: new Map(tasks) };
    });
}

/** Opens a file and reads all of it. @param known the pack of a task file */
async function openAll({ bytes, known }) {
  const pack = await openPack(known ?? bytes);
  if (known) await pack.addTask("mutant", bytes);
  (await pack.bases()).close();
  for (const id of pack.tasks.keys()) await pack.load(id);
  return pack;
}

/**
 * Folds each task of a file and compares it with its meaning.
 * @returns the first difference; undefined where there is none
 */
export async function check(file, truth, wasm) {
  if (truth === null) return undefined;
  if (truth.refused) return `the reader refuses it: ${truth.refused}`;
  const base = baseOf(truth);
  const backend = wasm ? "wasm" : "js";
  const given = new Map(base);
  const runtime = await createRuntime(await openAll(file), { base: given, backend, anyBase: true });
  try {
    const pristine = new Map([...base].map(([name, { data }]) => [name, data.slice()]));
    const before = new Map([...base].map(([name, tensor]) => [name, { ...tensor, data: pristine.get(name) }]));
    for (const id of [...truth.tasks.keys(), null]) {
      const task = truth.tasks.get(id);
      try {
        await runtime.switchTask(id);
      } catch (error) {
        if (!error.message.includes("DoRA's magnitude")) throw error;
        if (!mayRefuse(truth.modules, task, before)) return `${backend}, task ${id}: ${error.message}`;
        continue;
      }
      const wrong =
        difference(runtime, truth.modules, task, before) ??
        otherDifference(runtime, truth.modules, task, before, given);
      if (wrong) return `${backend}, task ${id}: ${wrong}`;
    }
  } finally {
    await runtime.close();
  }
  return undefined;
}

/**
 * Runs mutants. @param from first mutant
 * @param howMany number of mutants
 * @param judged whether accepted ones are compared with their meaning, which needs Python
 * @returns counts, and failures by number
 */
export async function runMutants(from, howMany, judged) {
  const count = { folded: 0, refused: 0 };
  const wrong = [];
  const warm = 50;
  let accepted = [];
  const judge = async () => {
    const truths = judged && accepted.length > 0 ? meaningsOf(accepted) : [];
    for (const [i, truth] of truths.entries()) {
      const { seed } = accepted[i];
      let message;
      try {
        message = await check(accepted[i], truth, seed % 3 === 0);
        if (truth) count.folded++;
      } catch (error) {
        // Two tasks may need bases of different shapes.
        if (!error?.tag) message = error?.stack ?? String(error);
      }
      if (message) wrong.push({ seed, message });
    }
    accepted = [];
  };
  for (let seed = from; seed < from + howMany; seed++) {
    const { kind, bytes, pack } = await mutant(seed);
    const file = { seed, bytes, known: kind === "pack" ? undefined : pack };
    const before = process.resourceUsage();
    let message;
    try {
      await openAll(file);
      accepted.push(file);
    } catch (error) {
      if (!error?.tag) message = error?.stack ?? String(error);
      count.refused++;
    }
    const after = process.resourceUsage();
    const took = (after.userCPUTime + after.systemCPUTime - before.userCPUTime - before.systemCPUTime) / 1e6;
    if (took > MOST.seconds) message ??= `it took ${took} s`;
    const grown = (after.maxRSS - before.maxRSS) / 1024;
    if (seed - from > warm && grown > MOST.megabytes) message ??= `it took ${grown.toFixed(0)} MB`;
    if (message) wrong.push({ seed, message });
    if (accepted.length === 500) await judge();
  }
  await judge();
  return { ...count, wrong };
}
