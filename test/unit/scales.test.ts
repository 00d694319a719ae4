/**
 * Tasks of very different size in one pack: reported losses are the true ones. Judged by the definition, from the bytes
 * of the pack, with ΔW formed in f64.
 */
import { type Coefficients, openPack, type Pack, type Side, type TensorRef } from "eigenlora";
import {
  type Adapter,
  type BuildOptions,
  buildPack,
  encodeTaskFile,
  projectAdapters,
  searchPack,
  type TaskLoss,
} from "eigenlora/build";
import t, { type Test } from "tap";
import { adapterOf, linear } from "../support/adapters.ts";
import { deltaOf } from "../support/compare.ts";
import { uniform } from "../support/internals/base.ts";
import { readTensor } from "../support/internals/format.ts";
import { completeDtypes } from "../support/internals/pack.ts";
import { concat, LOSSLESS } from "../support/packs.ts";

/** Name, outputs, inputs, rank. */
const SHAPES = [
  ["m.narrow", 24, 40, 4],
  ["m.wide", 64, 16, 2],
  ["m.even", 32, 32, 8],
] as const;
/** Factors of the norms of ΔW. */
const SCALES = [1e-4, 1e-3, 1e-2, 1e-1, 1, 10, 100, 1e3, 1e4];

/** Large part of a large adapter: B, or both factors alike. */
type Split = "B" | "both";

/** Adapters that have something in common. */
function adaptersOf(seed: number, split: Split, scales: readonly number[] = SCALES): Adapter[] {
  const random = uniform(seed);
  const values = (count: number): Float64Array => Float64Array.from({ length: count }, () => random() - 0.5);
  const common = SHAPES.map(([, out, inputs, rank]) => ({ A: values(rank * inputs), Bt: values(rank * out) }));
  return scales.map((scale, i) => {
    const [a, b] = split === "B" ? [1, scale] : [Math.sqrt(scale), Math.sqrt(scale)];
    const modules = SHAPES.map(([name, out, inputs, rank], m) => {
      const near = (factor: number, of: Float64Array): Float32Array => {
        const own = values(of.length);
        return Float32Array.from(of, (value, j) => 0.2 * factor * (value + own[j]!));
      };
      const term = { rank, A: near(a, common[m]!.A), Bt: near(b, common[m]!.Bt) };
      return linear(name, out, inputs, term);
    });
    return adapterOf(
      `t${i}`,
      modules.sort((a, b) => (a.name < b.name ? -1 : 1)),
      { byteLength: 1e4 },
    );
  });
}

interface Factors {
  readonly rank: number;
  readonly A: ArrayLike<number>;
  readonly Bt: ArrayLike<number>;
}

/** A task's factors by SPEC.md, in f64: those of `taskAdapter` are rounded to f32. */
async function factorsOf(pack: Pack, id: string): Promise<Map<string, Factors>> {
  const blob = await pack.load(id);
  const { bytes } = await pack.bases();
  return new Map(
    blob.terms.map((term) => {
      const module = pack.modules[term.module]!;
      const rank = term.rank + term.privateRank;
      const side = (
        shared: Coefficients | undefined,
        basis: Side | undefined,
        own: TensorRef | undefined,
        width: number,
      ): Float64Array => {
        const rows = new Float64Array(rank * width);
        if (shared && basis) {
          const [components, alpha] = [readTensor(bytes, basis.tensor), readTensor(blob.bytes, shared.tensor)];
          const [K, whole] = [basis.K, basis.tensor.width];
          for (let r = 0; r < shared.tensor.rows; r++)
            for (let i = 0; i < whole; i++) {
              let value = shared.mean ? components[K * whole + i]! : 0;
              for (let k = 0; k < K; k++) value += alpha[r * K + k]! * components[k * whole + i]!;
              rows[r * whole + i] = value;
            }
        }
        if (own) rows.set(readTensor(blob.bytes, own), term.rank * width);
        return rows;
      };
      const A = side(term.A, module.A[0], term.privateA, module.in);
      return [module.name, { rank, A, Bt: side(term.B, module.B[0], term.privateBt, module.out) }];
    }),
  );
}

async function measured(pack: Pack, { id, modules }: Adapter): Promise<Omit<TaskLoss, "id">> {
  const stored = await factorsOf(pack, id);
  let [lost, whole] = [0, 0];
  const errors: number[] = [];
  for (const { name, out, in: inputs, read } of modules.values()) {
    const exact = deltaOf(await read(), out, inputs);
    const found = stored.get(name);
    const left = found ? deltaOf(found, out, inputs).map((value, i) => value - exact[i]!) : exact;
    const [off, norm] = [left, exact].map((values) => values.reduce((sum, value) => sum + value ** 2, 0)) as [
      number,
      number,
    ];
    errors.push(Math.sqrt(off / norm));
    lost += off;
    whole += norm;
  }
  const mean = errors.reduce((a, b) => a + b, 0) / errors.length;
  return { total: Math.sqrt(lost / whole), mean, max: Math.max(...errors) };
}

/** Within 1 %, or 1e-6 where that is more. */
function agree(t: Test, said: Omit<TaskLoss, "id">, found: Omit<TaskLoss, "id">, what: string): void {
  for (const figure of ["total", "mean", "max"] as const) {
    const off = Math.abs(said[figure] - found[figure]);
    if (off <= Math.max(1e-6, 0.01 * found[figure])) continue;
    t.fail(`${what}: ${figure} is said to be ${said[figure]}, and is ${found[figure]}`);
  }
}

const F32 = LOSSLESS.dtype;
const INT4 = { basis: "int4", coefficients: "int4", head: "int8" } as const;
const WAYS: Readonly<Record<string, BuildOptions>> = {
  default: {},
  "k 4": { select: { kind: "k", k: 4 } },
  "k 12, no mean": { select: { kind: "k", k: 12 }, centering: "none" },
  "k 12, balanced": { select: { kind: "k", k: 12 }, gauge: "balanced" },
  "rank 2, balanced, f32": { select: { kind: "k", k: 16 }, gauge: "balanced", rank: 2, dtype: F32 },
  "all, f16": { select: { kind: "energy", share: 1 } },
  "all, int8": { select: { kind: "energy", share: 1 }, dtype: { basis: "int8", coefficients: "int8" } },
  lossless: LOSSLESS,
  "lossless, no mean": { ...LOSSLESS, centering: "none" },
  "lossless, balanced": { ...LOSSLESS, gauge: "balanced" },
  "lossless, all alike": { ...LOSSLESS, normalize: true },
  "rank 3, balanced, int4": { select: { kind: "k", k: 12 }, gauge: "balanced", rank: 3, dtype: INT4 },
  "rank 2, all alike": { select: { kind: "k", k: 12 }, gauge: "balanced", rank: 2, normalize: true },
  "alone, f32": { select: { kind: "k", k: 0 }, dtype: F32 },
  "alone, rank 2": { select: { kind: "k", k: 0 }, rank: 2 },
  "steps, k 4": { step: 0.01, select: { kind: "k", k: 4 } },
};

for (const split of ["B", "both"] as const) {
  const adapters = adaptersOf(3, split);

  t.test(`${split} of large adapters large: packs, and adapters that are added to them`, async (t) => {
    for (const [name, options] of Object.entries(WAYS)) {
      const { chunks, report } = await buildPack(adapters, options);
      const pack = await openPack(concat(chunks));
      for (const [i, adapter] of adapters.entries())
        agree(t, report.errors[i]!, await measured(pack, adapter), `${name}, ${adapter.id}`);
      if (options.step !== undefined || name.startsWith("alone")) continue;
      const later = adapters.map((adapter) => ({ ...adapter, id: `later ${adapter.id}` }));
      for (const [i, { entry, blob, residual }] of (
        await projectAdapters(pack, later, completeDtypes(options.dtype), { maxLoss: 1 })
      ).entries()) {
        await pack.addTask(entry.id, encodeTaskFile(entry, pack.basisId, blob));
        agree(t, residual, await measured(pack, later[i]!), `${name}, ${entry.id}`);
      }
    }
    for (const max of [0.15, 0.01, 0.001]) {
      const { chunks, report } = await searchPack(adapters, { goal: { kind: "error", max } });
      const pack = await openPack(concat(chunks));
      for (const [i, adapter] of adapters.entries()) {
        const found = await measured(pack, adapter);
        agree(t, report.errors[i]!, found, `searched for ${max}, ${adapter.id}`);
        t.ok(found.total <= max * (1 + 1e-6));
      }
    }
  });
}
