/**
 * Modes "core" and "factors": the terms of the active task, as a runtime hands them out. Loaded where one does not fold.
 */
import { nearest } from "../arguments.ts";
import type { PackModule } from "../format/format.ts";
import type { Term } from "../tensor/term.ts";
import type { WeightHost } from "./host.ts";
import { readWeight, type Slot } from "./slots.ts";
import type { ModulePlan } from "./stage.ts";
import { type PristineWeight, unfold } from "./unfold.ts";
import type { Workbench } from "./workbench.ts";

/** What the active task does to one module, for a model that adds it itself (docs/runtime.md, "Unfolded"). */
export interface ModuleTerm extends Term {
  /** [out], the layer's whole bias, where the task changes it. */
  readonly bias?: Float32Array | undefined;
}

export class Terms {
  readonly #mode: "core" | "factors";
  readonly #modules: readonly PackModule[];
  readonly #slots: readonly Slot[];
  #active: ReadonlyMap<number, Term> = new Map();
  /** Of the task before; the next one's are written there, so that the active ones stay whole until all of those are made. */
  #spare: ReadonlyMap<number, Term> = new Map();

  constructor(mode: "core" | "factors", modules: readonly PackModule[], slots: readonly Slot[]) {
    this.#mode = mode;
    this.#modules = modules;
    this.#slots = slots;
  }

  /** Modules whose terms change, with the pristine weights that DoRA's scales need. */
  async prepare(
    plans: readonly ModulePlan[],
    host: WeightHost | undefined,
    signal: AbortSignal | undefined,
  ): Promise<Map<number, Uint8Array | undefined>> {
    const weights = new Map<number, Uint8Array | undefined>(
      [...this.#active.keys()].map((module) => [module, undefined]),
    );
    for (const { module, magnitude } of plans) {
      const scaled = magnitude !== undefined;
      weights.set(module, scaled ? await readWeight(host!, this.#slots[module]!, undefined, { signal }) : undefined);
    }
    return weights;
  }

  /** Makes the terms of the plans. @returns what makes them the active ones, together with what else the task has */
  async make(
    plans: readonly ModulePlan[],
    weights: ReadonlyMap<number, Uint8Array | undefined>,
    bench: Workbench,
    signal: AbortSignal | undefined,
  ): Promise<() => void> {
    const device = bench.backend.view ? undefined : await import("./unfold-device.ts");
    const weightOf = (module: number): PristineWeight => {
      return { ...this.#slots[module]!.weight, data: weights.get(module)!, byteOffset: 0 };
    };
    const made = await unfold(plans, bench, this.#mode, weightOf, { old: this.#spare, signal, device });
    await bench.backend.finish();
    return () => {
      this.#spare = this.#active;
      this.#active = made;
    };
  }

  /** @throws RangeError for a module the pack does not have */
  indexOf(name: string): number {
    const names = this.#modules.map((module) => module.name);
    const index = names.indexOf(name);
    if (index >= 0) return index;
    throw new RangeError(`no module "${name}"; nearest: ${nearest(name, names).join(", ") || "none"}`);
  }

  /** @param bias the layer's, where the task changes it */
  term(name: string, bias: Float32Array | undefined): ModuleTerm | undefined {
    const index = this.indexOf(name);
    const term = this.#active.get(index);
    if (!bias) return term;
    const { in: inputs, out } = this.#modules[index]!;
    const none = { rank: 1, A: new Float32Array(inputs), Bt: new Float32Array(out) };
    return { ...(term ?? none), bias };
  }

  get byteLength(): number {
    let bytes = 0;
    for (const { core, A, Bt, rowScale } of [...this.#active.values(), ...this.#spare.values()]) {
      for (const array of [core, A, Bt, rowScale]) bytes += array?.byteLength ?? 0;
    }
    return bytes;
  }
}
