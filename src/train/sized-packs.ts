/**
 * Packs that tasks are distilled in, from few bytes to many: with components of all tasks, or with tasks by themselves.
 */
import type { Adapter } from "../adapters/adapter.ts";
import { DEFAULT_ERROR } from "../pack/allocate.ts";
import { type Built, buildPack } from "../pack/build.ts";
import type { BuildOptions } from "../pack/recipe.ts";
import { searchPack } from "../pack/search.ts";
import { partition } from "../pack/seek.ts";

/** Fewer tasks than this share too little for components of all. */
const FEW = 8;
/** Components of a side: of 20 to 40, on two suites of 20 and 53 adapters, those whose answers lost least for their bytes. */
const COMPONENTS = 36;
/** Steps of numbers, from few bytes to many: each pack is about a fifth larger than the one before. */
const STEPS = [0.28, 0.2, 0.14, 0.1, 0.07, 0.05, 0.035, 0.025, 0.018];
/** The same for tasks by themselves: shares of ΔW that may be lost. */
const ERRORS = [0.8, 0.6, 0.45, 0.34, 0.25, DEFAULT_ERROR, 0.1, 0.07, 0.05, 0.035, 0.025];
/** Packs from one of these to the next, where bytes are given. */
const BETWEEN = 8;

type Common = Pick<BuildOptions, "base" | "anyBase" | "workers">;

/** Packs of one kind, by their place among the sizes; places between two have fractions. */
export class SizedPacks {
  /** The last place. */
  readonly last: number;
  /** Where trying begins. */
  readonly first: number;
  readonly #sizes: readonly number[];
  readonly #make: (size: number) => Promise<Built>;
  readonly #bytes = new Map<number, number>();

  constructor(sizes: readonly number[], first: number, make: (size: number) => Promise<Built>) {
    this.last = sizes.length - 1;
    this.first = sizes.indexOf(first);
    this.#sizes = sizes;
    this.#make = make;
  }

  async make(at: number): Promise<Built> {
    const [low, high] = [this.#sizes[Math.floor(at)]!, this.#sizes[Math.ceil(at)]!];
    const built = await this.#make(low * (high / low) ** (at % 1));
    this.#bytes.set(at, built.report.bytes);
    return built;
  }

  async bytes(at: number): Promise<number> {
    return this.#bytes.get(at) ?? (await this.make(at)).report.bytes;
  }

  /** The whole place of the largest of at most so many bytes; the first where there is none. */
  async largest(most: number): Promise<number> {
    return Math.max(0, (await partition(this.last + 1, async (i) => (await this.bytes(i)) > most)) - 1);
  }

  /** The place of the largest of at most so many bytes, between two sizes too; undefined where there is none. */
  async within(most: number): Promise<number | undefined> {
    const first = await partition(BETWEEN * this.last + 1, async (i) => (await this.bytes(i / BETWEEN)) > most);
    return first > 0 ? (first - 1) / BETWEEN : undefined;
  }
}

/** Kinds of packs for these adapters, the most promising first. */
export function kindsOf(adapters: readonly Adapter[], common: Common): readonly SizedPacks[] {
  const shared = (step: number): Promise<Built> =>
    buildPack(adapters, { ...common, gauge: "balanced", step, select: { kind: "k", k: COMPONENTS } });
  // Sides are shared where that pays.
  const alone = (max: number): Promise<Built> => searchPack(adapters, { ...common, goal: { kind: "error", max } });
  const all = [new SizedPacks(STEPS, 0.05, shared), new SizedPacks(ERRORS, 0.34, alone)];
  return adapters.length < FEW ? all.slice(1) : all;
}
