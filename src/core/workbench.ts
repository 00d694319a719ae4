/**
 * A backend as one runtime uses it: the bases, scratch memory that is kept from switch to switch, and the operations on
 * whole modules: expand, fold, DoRA's scale. It knows plans and weights, but neither tasks nor hosts.
 *
 * Factors live in one scratch block, for a round of modules at a time. A CPU expands one module after the other, so that its
 * factors stay in a cache; a device expands as many as fit at once.
 */

import {
  after,
  at,
  type Backend,
  type Block,
  type ExpandJob,
  type FoldJob,
  type Owner,
  type ScaleJob,
  type Slice,
} from "../backends/backend.ts";
import type { PackModule, Side } from "../format/format.ts";
import type { Located, WeightHost } from "./base.ts";
import { type ModulePlan, type Pieces, Staging } from "./stage.ts";

/** Bytes of the factors of a round on a device. */
const ROUND_BYTES = 32 * 2 ** 20;

/** Expansions come last: they may be added to the task's own rows, and a device then has all of them in a row. */
const ORDER = ["private", "own", "shared"] as const;

/** Names of scratch memory. Those of the second group are for `apply.ts`: each step has its own, so that a device can do its parts at once. */
type Scratch = ("coefficients" | "factors" | "scale" | "weight") | ("applied" | "x" | "y" | "onA" | "inner" | "onB");

/** Bytes at which the factors of a plan lie in the scratch block, and the round that makes them. */
interface FactorPlace {
  readonly A: number;
  readonly Bt: number;
  readonly round: number;
}

/** How a weight is stored. */
type Stored = Pick<Located, "dtype" | "transposed">;

type Components = Pick<ExpandJob, "basis" | "dtype" | "rows" | "width">;

export class Workbench {
  readonly backend: Backend;
  /** Coefficients of the switch under way; `prepare` uploads them. */
  readonly staging: Staging = new Staging();
  readonly modules: readonly PackModule[];
  /** Bytes allocated and operations, counted until the caller sets them to 0. */
  allocated = 0;
  dispatches = 0;
  readonly #basis: Block;
  readonly #scratch = new Map<string, Block>();
  /** Prepared plans whose factors are there at the same time. */
  rounds: readonly ModulePlan[][] = [];
  readonly #places = new Map<ModulePlan, FactorPlace>();
  /** The round whose factors are there; -1 for none. */
  #expanded = -1;

  /** Uploads the bases. */
  constructor(backend: Backend, modules: readonly PackModule[], bases: Uint8Array) {
    this.backend = backend;
    this.modules = modules;
    this.#basis = backend.allocate(Math.max(bases.length, 16), "basis");
    backend.upload(at(this.#basis), bases);
  }

  allocate(bytes: number, owner: Owner): Block {
    this.allocated += bytes;
    return this.backend.allocate(bytes, owner);
  }

  /** Components of a side, and its mean, as operations of a backend take them. */
  components({ tensor: { dtype, rows, width, byteOffset } }: Side): Components {
    return { basis: at(this.#basis, byteOffset), dtype, rows, width };
  }

  /** Memory of at least `bytes` that lasts until the next call with this name asks for more. */
  reserve(name: Scratch, bytes: number): Slice {
    const held = this.#scratch.get(name);
    if (held && held.byteLength >= bytes && !held.refused) return at(held);
    if (held) this.backend.free(held);
    this.#scratch.delete(name);
    const block = this.allocate(Math.max(bytes, 16), "scratch");
    this.#scratch.set(name, block);
    return at(block);
  }

  /** What `reserve` gave for this name last. */
  reserved(name: Scratch): Slice {
    return at(this.#scratch.get(name)!);
  }

  /** Does all that can fail before a switch changes anything: takes memory for its factors, and uploads what is staged. */
  prepare(plans: readonly ModulePlan[]): void {
    const { values, used } = this.staging;
    const staged = this.reserve("coefficients", 4 * used);
    this.reserve("factors", this.#layOut(plans));
    const scaled = plans.filter((plan) => plan.magnitude !== undefined);
    this.reserve("scale", 4 * Math.max(0, ...scaled.map((plan) => this.modules[plan.module]!.out)));
    this.backend.upload(staged, new Uint8Array(values.buffer, 0, 4 * used));
  }

  /** Divides plans into rounds. Returns the bytes of the largest. */
  #layOut(plans: readonly ModulePlan[]): number {
    const most = this.backend.view ? 0 : ROUND_BYTES;
    const rounds: ModulePlan[][] = [];
    this.#places.clear();
    this.#expanded = -1;
    let [largest, used] = [0, 0];
    for (const plan of plans) {
      const module = this.modules[plan.module]!;
      const [bytesA, bytesB] = [align16(4 * plan.rank * module.in), align16(4 * plan.rank * module.out)];
      if (rounds.length === 0 || used + bytesA + bytesB > most) {
        rounds.push([]);
        used = 0;
      }
      const round = rounds.length - 1;
      rounds[round]!.push(plan);
      this.#places.set(plan, { A: used, Bt: used + bytesA, round });
      used += bytesA + bytesB;
      largest = Math.max(largest, used);
    }
    this.rounds = rounds;
    return largest;
  }

  /** Makes the factors of the round of a plan that was prepared, where they are not there. Yields between pieces of work. */
  *expand(plan: ModulePlan): Generator<void> {
    const { round } = this.#places.get(plan)!;
    if (this.#expanded === round) return;
    const { block } = this.reserved("factors");
    const staged = this.reserved("coefficients");
    for (const kind of ORDER) {
      for (const each of this.rounds[round]!) {
        const module = this.modules[each.module]!;
        const place = this.#places.get(each)!;
        yield* this.#fill(each.A[kind], staged, at(block, place.A), module.in);
        yield* this.#fill(each.Bt[kind], staged, at(block, place.Bt), module.out);
      }
    }
    this.#expanded = round;
  }

  /** A [rank, in] and Bt [rank, out] of a plan once they are made, in scratch memory until another round's are. */
  factors(plan: ModulePlan): { A: Slice; Bt: Slice } {
    const { A, Bt } = this.#places.get(plan)!;
    const { block } = this.reserved("factors");
    return { A: at(block, A), Bt: at(block, Bt) };
  }

  /** Makes one factor [rank, width] of its pieces. @param staged where what they count from is */
  *fill(pieces: Pieces, staged: Slice, out: Slice, width: number): Generator<void> {
    for (const kind of ORDER) yield* this.#fill(pieces[kind], staged, out, width);
  }

  *#fill(pieces: Pieces[keyof Pieces], staged: Slice, place: Slice, width: number): Generator<void> {
    const { backend } = this;
    for (const piece of pieces) {
      const coefficients = after(staged, 4 * piece.at);
      const out = after(place, 4 * piece.row * width);
      if ("basis" in piece) {
        const { basis, rows: rank, add } = piece;
        const job: ExpandJob = { out, coefficients, ...this.components(basis), rank, add };
        if (backend.expanding) yield* backend.expanding(job);
        else backend.expand(job);
        this.dispatches++;
      } else if (!piece.stored) this.copy(coefficients, out, 4 * piece.rank * width);
    }
  }

  /** out = base + ΔW of the plan, rows scaled where the task has magnitudes; out may be base. Yields between pieces of work. */
  *fold(plan: ModulePlan, weight: Stored, base: Slice, out: Slice): Generator<void> {
    const { backend } = this;
    yield* this.expand(plan);
    const scale = plan.magnitude === undefined ? undefined : yield* this.rowScale(plan, weight, base);
    const scaled = weight.transposed ? { columnScale: scale } : { rowScale: scale };
    const job: FoldJob = { ...this.#job(plan, weight, base), out, ...scaled };
    if (backend.folding) yield* backend.folding(job);
    else backend.fold(job);
    this.dispatches++;
  }

  /** DoRA's scale [out] of a plan with magnitudes, f32. Yields between pieces of work. */
  *rowScale(plan: ModulePlan, weight: Stored, base: Slice): Generator<void, Slice> {
    const { backend } = this;
    yield* this.expand(plan);
    const out = this.reserved("scale");
    const magnitude = at(this.reserved("coefficients").block, 4 * plan.magnitude!);
    const axis = weight.transposed ? "columns" : "rows";
    const job: ScaleJob = { ...this.#job(plan, weight, base), out, magnitude, axis };
    if (backend.scaling) yield* backend.scaling(job);
    else backend.scale(job);
    this.dispatches++;
    return out;
  }

  #job(plan: ModulePlan, { transposed, dtype }: Stored, base: Slice): Omit<FoldJob, "out"> {
    const { in: inputs, out } = this.modules[plan.module]!;
    const { A, Bt } = this.factors(plan);
    const [rows, columns, left, right] = transposed ? [inputs, out, A, Bt] : [out, inputs, Bt, A];
    return { base, dtype, rows, columns, stride: columns, left, right, rank: plan.rank };
  }

  copy(from: Slice, to: Slice, byteLength: number): void {
    this.backend.copy(from, to, byteLength);
    this.dispatches++;
  }

  /** f32 values as they lie in the CPU's memory; valid until memory is allocated. */
  floats(slice: Slice, count: number): Float32Array {
    const bytes = this.backend.view!(slice, 4 * count);
    return new Float32Array(bytes.buffer, bytes.byteOffset, count);
  }
}

function align16(bytes: number): number {
  return Math.ceil(bytes / 16) * 16;
}

/** Objects with the lifetime of a backend. */
export interface Started {
  readonly bench: Workbench;
  readonly passedOver: readonly string[];
  /** Parameters beside the adapted weights are read and written here. */
  readonly host: WeightHost | undefined;
}
