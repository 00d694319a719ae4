// @ts-nocheck: it handles what no type describes
/** Runs mutants through the package and compares accepted ones with the judge. */
import { createRuntime, openPack } from "eigenlora";
import { judge, judgeTaskFile } from "./judge.js";
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

/** Compares weights after a switch with W + ΔW in 64 bits. @returns the first difference, described */
function difference(runtime, modules, task, base) {
  for (const module of modules) {
    const { name, out, in: inputs } = module;
    const term = task?.terms.get(name);
    const found = runtime.weight(`${name}.weight`).data;
    const weights = new Float32Array(found.buffer, found.byteOffset, out * inputs);
    const before = base.get(`${name}.weight`).data;
    for (let o = 0; o < out; o++) {
      const row = Array.from(
        { length: inputs },
        (_, i) => before[at(module, o, i)] + (term?.delta[o * inputs + i] ?? 0),
      );
      const slack = Array.from(
        { length: inputs },
        (_, i) => (term?.bound[o * inputs + i] ?? 0) + 2 ** -23 * Math.abs(row[i]),
      );
      const norm = Math.hypot(...row);
      const off = Math.hypot(...slack);
      const scale = term?.magnitude ? (norm > 0 ? term.magnitude[o] / norm : 0) : 1;
      // Where a row almost cancels, its direction is known only within the bound of its elements.
      if (term?.magnitude && off > 0.01 * norm) continue;
      for (let i = 0; i < inputs; i++) {
        const expected = row[i] * scale;
        const share = term?.magnitude ? (2 * off) / norm + 2 ** -20 : 0;
        const allowed = term
          ? slack[i] * Math.abs(scale) * (1 + 2 ** -10) + Math.abs(term.magnitude?.[o] ?? 0) * share + 2 ** -125
          : 0;
        const value = weights[at(module, o, i)];
        if (Number.isFinite(expected) && Math.abs(expected) > 3.4e38) continue;
        if (!(Math.abs(value - expected) <= allowed))
          return `${name}[${o}, ${i}] is ${value}, expected ${expected} ± ${allowed}`;
      }
    }
  }
  return undefined;
}

/** Values of a parameter as a task has them, by its role: saved, bias, difference of a bias, rows. */
function valuesOf({ role, shape, indices, values }, before) {
  if (role < 2) return values;
  if (role === 2) return values.map((value, i) => before[i] + value);
  const all = Float64Array.from(before);
  indices.forEach((index, row) => all.set(values.subarray(row * shape[1], (row + 1) * shape[1]), index * shape[1]));
  return all;
}

/** Compares heads, biases and token rows after a switch, those of other tasks too. @returns the first difference, described */
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

/** Forms of a pack that are counted, to show that mutants of each were folded. */
const FORMS = {
  "coded sections": ({ coded }) => coded,
  "several bases of a side": ({ modules }) => modules.some(({ A, B }) => A.length > 1 || B.length > 1),
  "a basis on one side": ({ modules }) => modules.some(({ A, B }) => (A.length === 0) !== (B.length === 0)),
  "rows over components": ({ tasks }) => anySide(tasks, ({ basis, rows }) => basis && rows),
  "rows alone": ({ tasks }) => anySide(tasks, ({ basis, rows }) => !basis && rows),
  magnitudes: ({ tasks }) => anyTerm(tasks, ({ magnitude }) => magnitude),
};
const anyTerm = (tasks, holds) => [...tasks.values()].some(({ terms }) => [...terms.values()].some(holds));
const anySide = (tasks, holds) => anyTerm(tasks, ({ sides }) => sides.some(holds));

/** Counts of mutants, all zero. */
export const tally = () => {
  return { taken: 0, folded: 0, refused: 0, forms: Object.fromEntries(Object.keys(FORMS).map((form) => [form, 0])) };
};

/**
 * Does with a mutant everything a reader does. @returns a description of what is wrong; undefined where all is well
 * @param known the pack of a task file
 * @param told bytes for the judge. Default: the same bytes
 */
export async function check(bytes, known, wasm, count, told = bytes) {
  const pack = await openPack(known ?? bytes);
  if (known) await pack.addTask("mutant", bytes);
  (await pack.bases()).close();
  for (const id of pack.tasks.keys()) await pack.load(id);
  const truth = judge(known ?? told);
  if (known) truth.tasks.set("mutant", judgeTaskFile(told, truth));
  count.taken++;
  const size = truth.modules.reduce((sum, m) => sum + m.out * m.in, 0);
  if (size > 1e6) return undefined;
  const base = baseOf(truth);
  const backend = wasm ? "wasm" : "js";
  const given = new Map(base);
  const runtime = await createRuntime(pack, { base: given, backend, anyBase: true });
  try {
    const pristine = new Map([...base].map(([name, { data }]) => [name, data.slice()]));
    for (const id of [...truth.tasks.keys(), null]) {
      await runtime.switchTask(id);
      const before = new Map([...base].map(([name, tensor]) => [name, { ...tensor, data: pristine.get(name) }]));
      const task = truth.tasks.get(id);
      const wrong =
        difference(runtime, truth.modules, task, before) ??
        otherDifference(runtime, truth.modules, task, before, given);
      if (wrong) return `${backend}, task ${id}: ${wrong}`;
    }
  } finally {
    await runtime.close();
  }
  count.folded++;
  for (const [form, holds] of Object.entries(FORMS)) if (holds(truth)) count.forms[form]++;
  return undefined;
}

/**
 * Runs mutants. @param from first mutant
 * @param howMany number of mutants
 * @returns counts, and failures by number
 */
export async function runMutants(from, howMany, onProgress = () => {}) {
  const count = tally();
  const wrong = [];
  const warm = 50;
  for (let seed = from; seed < from + howMany; seed++) {
    const { kind, bytes, pack } = mutant(seed);
    const before = process.resourceUsage();
    let message;
    try {
      message = await check(bytes, kind === "pack" ? undefined : pack, seed % 3 === 0, count);
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
    onProgress(seed - from + 1, wrong);
  }
  return { ...count, wrong };
}
