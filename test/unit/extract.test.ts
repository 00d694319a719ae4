/**
 * Extraction, compared with numpy's f64 values on real adapters (data/goldens/extract, made by
 * make_extract_goldens.py), and with its own definitions on generated stacks: ΔW is formed here, which the package
 * never does.
 */
import { readdirSync, readFileSync } from "node:fs";
import type { Dtype } from "eigenlora";
import { readAdapters } from "eigenlora/node";
import fc from "fast-check";
import t from "tap";
import { deltaOf, tensorsOf } from "../support/compare.ts";
import { decodeTensor, uniform } from "../support/internals/base.ts";
import {
  balance,
  type ExtractOptions,
  extractModule,
  type ModuleExtraction,
  type ModuleMember,
  type ModuleStack,
  multiplyTransposed,
  type Pair,
  type SideBasis,
} from "../support/internals/pack.ts";
import { data } from "../support/packs.ts";
import { runs } from "../support/required.ts";

const F32: ExtractOptions = {
  gauge: "as-trained",
  centering: "keep",
  select: { kind: "energy", share: 1 },
  basisDtype: "f32",
  coefficientDtype: "f32",
};

/** The stacks of real adapters. */
async function readStacks(tasks: readonly string[]): Promise<ModuleStack[]> {
  const stacks = new Map<string, { name: string; out: number; in: number; members: ModuleMember[] }>();
  const adapters = await readAdapters(tasks.map((task) => data(`adapters/own-seed/${task}`)));
  // The golden values have their own order.
  adapters.sort((a, b) => tasks.indexOf(a.id) - tasks.indexOf(b.id));
  for (const { id, modules, close } of adapters) {
    for (const { name, out, in: inputs, read } of modules.values()) {
      const stack = stacks.get(name) ?? { name, out, in: inputs, members: [] };
      stacks.set(name, stack);
      stack.members.push({ id, ...(await read()) });
    }
    await close();
  }
  return [...stacks.values()];
}

// ---- slow, obvious definitions --------------------------------------------------------------------------------------

function norm(x: Float64Array): number {
  return Math.sqrt(x.reduce((sum, value) => sum + value * value, 0));
}

function difference(x: Float64Array, y: Float64Array): Float64Array {
  return x.map((value, i) => value - y[i]!);
}

/** Decoded rows of a basis, the mean last. */
function decoded(basis: SideBasis): { E: Float64Array[]; mean: Float64Array | undefined } {
  const rows = basis.components + (basis.mean ? 1 : 0);
  const values = Float64Array.from(decodeTensor(basis.dtype, basis.encoded, rows, basis.width));
  const all = Array.from({ length: rows }, (_, i) => values.subarray(i * basis.width, (i + 1) * basis.width));
  return { E: all.slice(0, basis.components), mean: basis.mean ? all[basis.components] : undefined };
}

/** α·E + M for each row. */
function rowsOf(basis: SideBasis, alpha: ArrayLike<number>, rank: number): Float64Array {
  const { E, mean } = decoded(basis);
  const out = new Float64Array(rank * basis.width);
  for (let i = 0; i < rank; i++) {
    for (let j = 0; j < basis.width; j++) {
      let sum = mean?.[j] ?? 0;
      for (let k = 0; k < E.length; k++) sum += alpha[i * E.length + k]! * E[k]![j]!;
      out[i * basis.width + j] = sum;
    }
  }
  return out;
}

/** ‖ΔW − ΔW'‖ / ‖ΔW‖ of a stored task, from what is stored. */
function storedError(result: ModuleExtraction, member: ModuleMember, type: Dtype): number {
  const task = result.tasks.find(({ id }) => id === member.id)!;
  const A = rowsOf(result.A, decodeTensor(type, task.A.coefficients!, task.rank, result.A.components), task.rank);
  const Bt = rowsOf(result.B, decodeTensor(type, task.B.coefficients!, task.rank, result.B.components), task.rank);
  const exact = deltaOf(member);
  const length = norm(exact);
  return length > 0 ? norm(difference(exact, deltaOf({ rank: task.rank, A, Bt }))) / length : 0;
}

/** ‖E·Eᵀ − I‖_max of what is stored. */
function orthonormality(basis: SideBasis): number {
  const { E } = decoded(basis);
  let worst = 0;
  E.forEach((x, i) => {
    E.forEach((y, j) => {
      const entry = x.reduce((sum, value, n) => sum + value * y[n]!, i === j ? -1 : 0);
      worst = Math.max(worst, Math.abs(entry));
    });
  });
  return worst;
}

/** EᵀE [width, width]: the same for every basis of one subspace. */
function projector(basis: SideBasis): Float64Array {
  const { E } = decoded(basis);
  const out = new Float64Array(basis.width ** 2);
  for (const row of E) {
    for (let i = 0; i < basis.width; i++) {
      for (let j = 0; j < basis.width; j++) out[i * basis.width + j]! += row[i]! * row[j]!;
    }
  }
  return out;
}

function largest(x: ArrayLike<number>, y?: ArrayLike<number>): number {
  let peak = 0;
  for (let i = 0; i < x.length; i++) peak = Math.max(peak, Math.abs(x[i]! - (y?.[i] ?? 0)));
  return peak;
}

// ---- generated stacks ---------------------------------------------------------------------------------------------

/** Adapters of the given ranks that share a few directions, as trained ones do. */
function makeStack(seed: number, ranks: readonly number[], outputs: number, inputs: number): ModuleStack {
  const next = uniform(seed);
  const random = (): number => 2 * next() - 1;
  const side = (width: number): (() => Float32Array) => {
    const shared = Array.from({ length: 3 }, () => Float64Array.from({ length: width }, random));
    return () => {
      const weights = shared.map(() => 2 * random());
      return Float32Array.from({ length: width }, (_, j) =>
        shared.reduce((sum, row, k) => sum + weights[k]! * row[j]!, 0.2 * random()),
      );
    };
  };
  const rowA = side(inputs);
  const rowB = side(outputs);
  const rows = (make: () => Float32Array, rank: number): Float32Array =>
    Float32Array.from(Array.from({ length: rank }, () => [...make()]).flat());
  return {
    name: "layer",
    out: outputs,
    in: inputs,
    members: ranks.map((rank, i) => ({ id: `task ${i}`, rank, A: rows(rowA, rank), Bt: rows(rowB, rank) })),
  };
}

const stacks = fc
  .record({
    seed: fc.nat(),
    ranks: fc.array(fc.integer({ min: 1, max: 5 }), { minLength: 1, maxLength: 5 }),
    outputs: fc.integer({ min: 2, max: 24 }),
    inputs: fc.integer({ min: 2, max: 24 }),
    lean: fc.constantFrom("none", "none", "row of A", "all of A", "row of B", "zero"),
  })
  .map(({ seed, ranks, outputs, inputs, lean }) => leaning(makeStack(seed, ranks, outputs, inputs), lean));

/** The stack with rows of its first adapter that depend on each other, or with factors of 0. */
function leaning(stack: ModuleStack, lean: string): ModuleStack {
  const { A, Bt } = stack.members[0]!;
  if (lean === "row of A") A.fill(0, 0, stack.in);
  if (lean === "all of A") for (let i = stack.in; i < A.length; i++) A[i] = A[i % stack.in]!;
  if (lean === "row of B") Bt.fill(0, 0, stack.out);
  if (lean === "zero") Bt.fill(0);
  return stack;
}

const gauges = fc.constantFrom("as-trained" as const, "balanced" as const);
const centerings = fc.constantFrom("keep" as const, "none" as const);

// ---- golden values ------------------------------------------------------------------------------------------------

interface Golden {
  tasks: string[];
  modules: string[];
  settings: Record<
    string,
    {
      error: Record<string, Record<string, number>>;
    }
  >;
}

const golden = JSON.parse(readFileSync(data("goldens/extract/golden.json"), "utf8")) as Golden;
const values = await tensorsOf(data("goldens/extract/column.safetensors"));
const real = await readStacks(golden.tasks);
const TRIMMED = "balanced none, ranks trimmed to 8 4 6 2 8 3 in task order, error against the trimmed adapters, K=12";

/** The first `ranks[i]` balanced pairs of each adapter, as adapters of their own. */
function trimmed(stack: ModuleStack, ranks: readonly number[]): ModuleStack {
  const members = stack.members.map((member, i): ModuleMember => {
    const pair = balance(toPair(member), stack.out, stack.in);
    const rank = ranks[i]!;
    return {
      id: member.id,
      rank,
      A: Float32Array.from(pair.A.subarray(0, rank * stack.in)),
      Bt: Float32Array.from(pair.Bt.subarray(0, rank * stack.out)),
    };
  });
  return { ...stack, members };
}

function toPair({ rank, A, Bt }: ModuleMember): Pair {
  return { rank, A: Float64Array.from(A), Bt: Float64Array.from(Bt) };
}

const RANKS = [8, 4, 6, 2, 8, 3];
const settings: [string, Partial<ExtractOptions>, (stack: ModuleStack) => ModuleStack][] = [
  ["column keep K=16", { select: { kind: "k", k: 16 } }, (stack) => stack],
  ["column none K=16", { select: { kind: "k", k: 16 }, centering: "none" }, (stack) => stack],
  ["balanced none K=16", { select: { kind: "k", k: 16 }, centering: "none", gauge: "balanced" }, (stack) => stack],
  [TRIMMED, { select: { kind: "k", k: 12 }, centering: "none" }, (stack) => trimmed(stack, RANKS)],
  [TRIMMED, { select: { kind: "k", k: 12 }, centering: "none", gauge: "balanced" }, (stack) => trimmed(stack, RANKS)],
];

for (const [name, options, prepare] of settings) {
  t.test(`golden: ${name}, ${options.gauge ?? "as-trained"}`, async () => {
    const expected = golden.settings[name]!;
    t.same(real.map((stack) => stack.name).sort(), golden.modules);
    for (const stack of real) {
      const prepared = prepare(stack);
      const result = extractModule(prepared, { ...F32, ...options });
      for (const task of result.tasks) {
        const error = expected.error[task.id]![stack.name]!;
        t.ok(Math.abs(task.error - error) <= 1e-5, `${stack.name} ${task.id}: ${task.error}, numpy ${error}`);
      }
    }
  });
}

t.test("golden: means, singular values and projectors", async () => {
  let projectors = 0;
  for (const stack of real) {
    const result = extractModule(stack, { ...F32, select: { kind: "k", k: 16 } });
    for (const side of ["A", "B"] as const) {
      const basis = result[side];
      const key = `${stack.name}.${side}`;
      const mean = values.get(`${key}.mean`)!.data;
      t.ok(largest(decoded(basis).mean!, mean) <= 1e-5 * largest(mean), `${key}: mean`);
      const singular = values.get(`${key}.singular`)!.data;
      t.equal(basis.singular.length, singular.length);
      t.ok(largest(basis.singular, singular) <= 1e-5 * singular[0]!, `${key}: singular values`);
      const squares = singular.map((value) => value * value);
      const explained = sum(squares.subarray(0, 16)) / sum(squares);
      t.ok(Math.abs(basis.explained - explained) <= 1e-5, `${key}: explained`);
      const expected = values.get(`${key}.projector_of_16`)?.data;
      if (!expected || (singular[15]! - singular[16]!) / singular[0]! <= 1e-3) continue;
      projectors++;
      t.ok(largest(projector(basis), expected) <= 1e-5, `${key}: projector`);
    }
  }
  t.ok(projectors > 0, "a gap allowed a projector to be compared");
});

function sum(x: Iterable<number>): number {
  let total = 0;
  for (const value of x) total += value;
  return total;
}

t.test("real adapters: all 20, three ways to choose K", async () => {
  const tasks = readdirSync(data("adapters/own-seed")).sort();
  const [stack] = (await readStacks(tasks)) as [ModuleStack];
  for (const type of ["f16", "bf16", "int8", "int4", "int3"] as const) {
    const options = {
      ...F32,
      basisDtype: type,
      coefficientDtype: type,
      select: { kind: "energy", share: 0.9 },
    } as const;
    const result = extractModule(stack, options);
    for (const side of [result.A, result.B]) {
      const squares = side.singular.map((value) => value * value);
      const total = squares.reduce((a, b) => a + b, 0);
      const held = (k: number): number => squares.subarray(0, k).reduce((a, b) => a + b, 0);
      t.ok(held(side.components) >= 0.9 * total && held(side.components - 1) < 0.9 * total, "fewest with that share");
    }
    const [member] = stack.members as [ModuleMember];
    const measured = storedError(result, member, type);
    const { error } = result.tasks[0]!;
    t.ok(Math.abs(error - measured) <= 1e-7, `${type}: ${error}, measured ${measured}`);
  }
});

// ---- properties -----------------------------------------------------------------------------------------------------

t.test("components are orthonormal and energy 1 is lossless", async () => {
  fc.assert(
    fc.property(stacks, gauges, centerings, (stack, gauge, centering) => {
      const result = extractModule(stack, { ...F32, gauge, centering });
      const lossless = stack.members.every((member, i) => {
        const measured = storedError(result, member, "f32");
        return measured <= 1e-6 && Math.abs(result.tasks[i]!.error - measured) <= 5e-7;
      });
      const clean = orthonormality(result.A) <= 1e-6 && orthonormality(result.B) <= 1e-6;
      return lossless && clean;
    }),
    { seed: 1, numRuns: runs(200) },
  );
});

t.test("reported errors are those of what is stored", async () => {
  const types = fc.constantFrom<Dtype>("f32", "f16", "bf16", "int8", "int4", "int3");
  fc.assert(
    fc.property(
      stacks,
      gauges,
      centerings,
      types,
      types,
      fc.integer({ min: 1, max: 8 }),
      (stack, gauge, centering, basisDtype, coefficientDtype, k) => {
        const options: ExtractOptions = { gauge, centering, basisDtype, coefficientDtype, select: { kind: "k", k } };
        const result = extractModule(stack, options);
        return stack.members.every((member, i) => {
          const measured = storedError(result, member, coefficientDtype);
          return Math.abs(result.tasks[i]!.error - measured) <= 1e-6 * (1 + measured);
        });
      },
    ),
    { seed: 2, numRuns: runs(200) },
  );
});

t.test("ΔW does not depend on the gauge, nor the balanced pack on the gauge it came in", async () => {
  fc.assert(
    fc.property(stacks, centerings, fc.nat(), (stack, centering, seed) => {
      const next = uniform(seed);
      const random = (): number => 2 * next() - 1;
      const members = stack.members.map((member): ModuleMember => {
        // Another gauge: rows mixed by a unit lower triangular R, and B by its inverse.
        const A = Float64Array.from(member.A);
        const Bt = Float64Array.from(member.Bt);
        for (let i = 1; i < member.rank; i++) {
          const factor = random();
          for (let j = 0; j < stack.in; j++) A[i * stack.in + j]! += factor * A[(i - 1) * stack.in + j]!;
          for (let j = 0; j < stack.out; j++) Bt[(i - 1) * stack.out + j]! -= factor * Bt[i * stack.out + j]!;
        }
        return { ...member, A: Float32Array.from(A), Bt: Float32Array.from(Bt) };
      });
      const options: ExtractOptions = { ...F32, gauge: "balanced", centering, select: { kind: "k", k: 3 } };
      const one = extractModule(stack, options);
      const other = extractModule({ ...stack, members }, options);
      return one.tasks.every((task, i) => Math.abs(task.error - other.tasks[i]!.error) <= 1e-3);
    }),
    { seed: 5, numRuns: runs(100) },
  );
  for (const stack of real.slice(0, 2)) {
    for (const member of stack.members) {
      const pair = balance(toPair(member), stack.out, stack.in);
      const exact = deltaOf(member);
      t.ok(norm(difference(exact, deltaOf(pair))) <= 1e-6 * norm(exact), "balancing keeps ΔW");
      const rows = multiplyTransposed(pair.A, pair.A, pair.rank, pair.rank, stack.in);
      const columns = multiplyTransposed(pair.Bt, pair.Bt, pair.rank, pair.rank, stack.out);
      t.ok(largest(rows, columns) <= 1e-12 * rows[0]!, "A·Aᵀ = Bᵀ·B");
      t.ok(
        rows.every((value, i) => i % (pair.rank + 1) === 0 || Math.abs(value) <= 1e-12 * rows[0]!),
        "diagonal",
      );
    }
  }
});
