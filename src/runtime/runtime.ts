/**
 * The runtime: one pack on one base model, and which task is active. It owns what is resident, orders switches and makes
 * each of them happen as a whole or not at all. The arithmetic is the backend's, the bytes are the pack's, the weights are
 * the host's.
 */
import type { Backend, Block, FoldJob, Owner, Slice } from "../backends/backend.ts";
import { createBackend, type BackendOptions } from "../backends/select.ts";
import { BackendError, BaseMismatchError, TaskError } from "../errors.ts";
import { nearest, type NameMatcher } from "../names.ts";
import type { PackModule } from "../pack/format.ts";
import type { Pack } from "../pack/pack.ts";
import type { FetchOptions } from "../source.ts";
import { correlation, fingerprint, SAME_FLOAT } from "./fingerprint.ts";
import { openHost, type BaseInput, type View, type WeightHost } from "./host.ts";
import { Locator, type Located } from "./locate.ts";
import { Parameters, type Replacement } from "./parameters.ts";
import { stage, Staging, type ModulePlan, type Part } from "./stage.ts";

/** What is active: a task, null for the pristine base, or tasks with strengths. */
export type Selection = string | null | Readonly<Record<string, number>>;

export interface RuntimeOptions extends BackendOptions, FetchOptions {
  /** The base model's weights. Needed for mode "folded"; in the others only for DoRA and for biases. */
  base?: BaseInput;
  /**
   * `folded`: W0 + ΔW is written where the weights are. `factors`: A and B of the active task are handed out. `core`: the
   * product of the coefficients is handed out, for a model that has the components built in. Folded when there is a base.
   */
  mode?: "folded" | "factors" | "core";
  /**
   * `copy` keeps the pristine weights in memory. `reload` reads them again at each switch: half the resident memory, for a
   * base that is a file. `copy` unless given.
   */
  policy?: "copy" | "reload";
  /** Names of weights in the base, by module name of the pack, where matching by suffix does not find them. */
  names?: ReadonlyMap<string, string>;
  /** Accept a base whose fingerprint differs, for instance one that was trained further. */
  anyBase?: boolean;
  signal?: AbortSignal;
}

export interface SwitchOptions {
  signal?: AbortSignal;
  /** Whose saved modules (classifier) to use in a blend of tasks with different ones. */
  head?: string;
}

/** What a switch did and what it cost. */
export interface SwitchReport {
  task: Selection;
  /** Read from the pack for this switch. */
  bytesRead: number;
  requests: number;
  /** Adapted modules written: those of the new task and those put back to the base. */
  modules: number;
  /** Operations handed to the backend. */
  dispatches: number;
  /** Bytes of new memory the backend had to allocate; 0 once warm. */
  allocated: number;
  /** Parameters the task brings that the base lacks. */
  added: string[];
  /** Parameters replaced whole: heads, biases, token rows. */
  replaced: string[];
  milliseconds: { read: number; compute: number; total: number };
}

/** What the active task does to one module, for a model that adds it itself (DESIGN of the unfolded forms: README). */
export interface Term {
  /** Mode "core": [K_A + mean, K_B + mean] with ΔW = E_B'ᵀ · coreᵀ · E_A', components first, mean last. */
  core?: View;
  /** [q, in] */
  A: View;
  /** [out, q]; q ≥ 1, zeros where there is nothing. */
  B: View;
  /** [out], multiplies the rows of W + ΔW (DoRA). */
  rowScale?: View;
  /** [out], the layer's whole bias, where the task changes it. */
  bias?: View;
}

/** Resident bytes by owner. */
export interface MemoryReport extends Record<Owner, number> {
  /** Held by the backend beyond what is in use. */
  reserved: number;
  total: number;
}

/** An adapted weight of the base. */
interface Slot {
  module: PackModule;
  weight: Located;
  pristine: Block | undefined;
  active: Block | undefined;
}

/** The unfolded form of one module of the active task. */
interface Unfolded {
  rank: number;
  core: Float32Array | undefined;
  A: Float32Array;
  B: Float32Array;
  rowScale: Float32Array | undefined;
}

/**
 * Loads the bases, finds the adapted weights in the base model and checks that it is the right one.
 * @throws BaseMismatchError when a module is missing, ambiguous, of another shape or of another model
 * @throws BackendError when the backend asked for cannot start or there is not enough memory
 * @example
 * const runtime = await createRuntime(pack, { base: "model.safetensors" });
 * await runtime.switchTask("sst2");
 * const { data } = runtime.weight("encoder.layer.0.attention.self.query");
 */
export async function createRuntime(pack: Pack, options: RuntimeOptions = {}): Promise<Runtime> {
  const { base, mode = base ? "folded" : "core", policy = "copy", signal } = options;
  if (!["folded", "factors", "core"].includes(mode)) throw new RangeError(`mode: got ${JSON.stringify(mode)}`);
  if (!["copy", "reload"].includes(policy)) throw new RangeError(`policy: got ${JSON.stringify(policy)}`);
  if (mode === "folded" && base === undefined) throw new TypeError('mode "folded" needs a base');
  const { backend, passedOver } = await createBackend(options);
  let closeHost: (() => Promise<void>) | undefined;
  try {
    const host = base === undefined ? undefined : await openHost(base, options);
    // A host that the caller made is the caller's to close.
    if (host !== base) closeHost = async () => host?.close?.();
    if (policy === "reload" && host?.begin) {
      throw new TypeError('policy "reload" needs a base that is read from a file; this host is written in place');
    }
    const locator = new Locator(host);
    const slots = host ? findSlots(pack.modules, locator, options.names) : [];
    const bases = await pack.takeBases({ signal });
    const basis = backend.allocate(Math.max(bases.length, 16), "basis");
    backend.upload({ block: basis, byteOffset: 0 }, bases);
    const runtime = new Runtime({ pack, backend, passedOver, mode, policy, host, basis, slots, locator, closeHost });
    await runtime.attach(bases, options.anyBase ?? false, signal);
    return runtime;
  } catch (error) {
    backend.dispose();
    await closeHost?.();
    throw error;
  }
}

function findSlots(
  modules: readonly PackModule[],
  locator: Locator,
  byHand: ReadonlyMap<string, string> | undefined,
): Slot[] {
  const owners = new Map<string, string>();
  return modules.map((module) => {
    const weight = locator.locate(module, byHand);
    const other = owners.get(weight.name);
    if (other !== undefined) {
      throw new BaseMismatchError(`the modules "${other}" and "${module.name}" both match the weight "${weight.name}"`, {
        module: module.name,
        candidates: [weight.name],
      });
    }
    owners.set(weight.name, module.name);
    return { module, weight, pristine: undefined, active: undefined };
  });
}

interface RuntimeParts {
  pack: Pack;
  backend: Backend;
  passedOver: readonly string[];
  mode: Runtime["mode"];
  policy: Runtime["policy"];
  host: WeightHost | undefined;
  basis: Block;
  slots: readonly Slot[];
  locator: Locator;
  closeHost: (() => Promise<void>) | undefined;
}

/** A pack at work. Made by `createRuntime`. */
export class Runtime {
  readonly pack: Pack;
  readonly mode: "folded" | "factors" | "core";
  readonly policy: "copy" | "reload";
  /** Which backend runs, for instance "wasm (simd)". */
  readonly backend: string;
  /** Why backends before it were not used. */
  readonly passedOver: readonly string[];

  readonly #backend: Backend;
  readonly #host: WeightHost | undefined;
  readonly #basis: Block;
  readonly #slots: readonly Slot[];
  readonly #slotsByName = new Map<string, Slot>();
  readonly #parameters: Parameters;
  readonly #closeHost: (() => Promise<void>) | undefined;
  readonly #names: NameMatcher;
  readonly #staging = new Staging();
  readonly #scratch = new Map<string, Block>();
  /** Modules, by index, that are not pristine now. */
  #changed = new Set<number>();
  #unfolded = new Map<number, Unfolded>();
  #task: Selection = null;
  #queue: Promise<unknown> = Promise.resolve();
  #allocated = 0;
  #dispatches = 0;
  #disposed = false;

  /** Use `createRuntime`. */
  constructor(parts: RuntimeParts) {
    const { backend, host, locator, slots } = parts;
    this.pack = parts.pack;
    this.backend = backend.name === "js" ? "js" : `${backend.name} (${backend.variant})`;
    this.passedOver = parts.passedOver;
    this.mode = parts.mode;
    this.policy = parts.policy;
    this.#backend = backend;
    this.#host = host;
    this.#closeHost = parts.closeHost;
    this.#basis = parts.basis;
    this.#slots = slots;
    this.#names = locator.names;
    this.#parameters = new Parameters(host, locator);
    for (const slot of slots) {
      for (const name of [slot.weight.name, slot.module.name]) {
        this.#slotsByName.set(name, slot);
        this.#slotsByName.set(name.replace(/\.weight$/, ""), slot);
      }
    }
  }

  /** The active task. */
  get task(): Selection {
    return this.#task;
  }

  /** @internal Reads the adapted weights, checks fingerprints and allocates what stays. */
  async attach(bases: Uint8Array, anyBase: boolean, signal: AbortSignal | undefined): Promise<void> {
    for (const slot of this.#slots) {
      const keep = this.mode === "folded";
      if (!keep && (anyBase || slot.module.fingerprint === undefined)) continue;
      // Both before the read: memory that grows would detach the view that is read into.
      const pristine = keep && this.policy === "copy" ? this.#allocate(slot.weight.byteLength, "pristine") : undefined;
      if (keep && !this.#host!.begin) slot.active = this.#allocate(slot.weight.byteLength, "active");
      const into = pristine && this.#backend.view({ block: pristine, byteOffset: 0 }, slot.weight.byteLength);
      const view = await this.#host!.read(slot.weight.name, into, { signal });
      const bytes = (view.data as Uint8Array).subarray(view.byteOffset, view.byteOffset + slot.weight.byteLength);
      if (!anyBase) checkFingerprint(slot, bytes, bases);
      slot.pristine = pristine;
      if (slot.active) this.#backend.upload({ block: slot.active, byteOffset: 0 }, bytes);
    }
  }

  /**
   * Makes a task, a blend or the pristine base active. Calls are queued. When it fails or is aborted, the previous task
   * stays whole.
   * @param selection a task id; null for the base; or strengths by id, W0 + Σ strength · ΔW
   * @throws TaskError for an unknown id (naming the nearest), a blend with DoRA, heads that cannot be blended
   * @throws SourceError, FormatError when the task's blob cannot be read or is damaged
   * @example
   * await runtime.switchTask("sst2");
   * await runtime.switchTask({ sst2: 0.7, cola: 0.3 });
   * await runtime.switchTask(null);
   */
  switchTask(selection: Selection, options: SwitchOptions = {}): Promise<SwitchReport> {
    const run = this.#queue.then(() => this.#switch(selection, options));
    this.#queue = run.catch(() => undefined);
    return run;
  }

  async #switch(selection: Selection, { signal, head }: SwitchOptions): Promise<SwitchReport> {
    const started = performance.now();
    this.#live();
    signal?.throwIfAborted();
    const before = { ...this.pack.reads };
    const strengths = toStrengths(selection);
    const parts: Part[] = await Promise.all(
      strengths.map(async ([id, weight]) => ({ id, weight, blob: await this.pack.load(id, { signal }) })),
    );
    this.#checkBlend(parts, head);
    const infos = this.pack.tasks;
    const metadata = new Map(parts.map(({ id }) => [id, infos.get(id)?.metadata ?? {}]));
    const replacements = await this.#parameters.resolve(parts, metadata, head, signal);
    const plans = stage(parts, this.pack.modules, this.#staging);
    const touched = new Set([...this.#changed, ...plans.map((p) => p.module)]);
    const pristine = await this.#readPristine(plans, touched, signal);
    const read = performance.now();
    signal?.throwIfAborted();

    this.#allocated = 0;
    this.#dispatches = 0;
    if (this.mode === "folded") await this.#fold(plans, touched, pristine, replacements);
    else this.#unfolded = this.#unfold(plans, pristine);
    await this.#backend.finish();
    this.#parameters.active = replacements;
    this.#changed = new Set(plans.map((p) => p.module));
    this.#task = typeof selection === "object" && selection !== null ? { ...selection } : selection;
    const done = performance.now();
    return {
      task: this.#task,
      bytesRead: this.pack.reads.bytes - before.bytes,
      requests: this.pack.reads.requests - before.requests,
      modules: touched.size,
      dispatches: this.#dispatches,
      allocated: this.#allocated,
      added: [...replacements].filter(([, r]) => r.added).map(([name]) => name),
      replaced: [...replacements].filter(([, r]) => !r.added).map(([name]) => name),
      milliseconds: { read: read - started, compute: done - read, total: done - started },
    };
  }

  #checkBlend(parts: readonly Part[], head: string | undefined): void {
    if (head !== undefined && !parts.some((p) => p.id === head)) {
      throw new TaskError(`head "${head}" is not one of the tasks switched to`, { task: head });
    }
    for (const { id, weight, blob } of parts) {
      const scaled = blob.terms.find((t) => t.magnitude);
      if (!scaled) continue;
      const name = this.pack.modules[scaled.module]!.name;
      if (parts.length > 1 || weight !== 1) {
        throw new TaskError(
          `task "${id}" uses DoRA on "${name}", whose change is not additive: it cannot be blended or scaled`,
          { task: id },
        );
      }
      if (!this.#host) {
        throw new TaskError(`task "${id}" uses DoRA on "${name}", which needs the base's weights: pass \`base\``, {
          task: id,
        });
      }
    }
  }

  /** Pristine weights that a switch needs and memory does not hold, all of them read before anything is changed. */
  async #readPristine(
    plans: readonly ModulePlan[],
    touched: ReadonlySet<number>,
    signal: AbortSignal | undefined,
  ): Promise<Map<number, Uint8Array>> {
    const read = new Map<number, Uint8Array>();
    const scaled = plans.filter((p) => p.magnitude !== undefined).map((p) => p.module);
    for (const index of this.mode === "folded" ? touched : scaled) {
      const slot = this.#slots[index]!;
      if (slot.pristine) continue;
      const view = await this.#host!.read(slot.weight.name, undefined, { signal });
      read.set(index, (view.data as Uint8Array).subarray(view.byteOffset, view.byteOffset + slot.weight.byteLength));
    }
    return read;
  }

  /** Writes W0 + ΔW of the plans, and W0 where the previous task had changed a weight and the new one does not. */
  async #fold(
    plans: readonly ModulePlan[],
    touched: ReadonlySet<number>,
    read: ReadonlyMap<number, Uint8Array>,
    replacements: ReadonlyMap<string, Replacement>,
  ): Promise<void> {
    this.#reserveFactors(plans);
    const largest = Math.max(0, ...[...touched].map((i) => (this.#slots[i]!.active ? 0 : this.#slots[i]!.weight.byteLength)));
    if (largest > 0) this.#reserve("weight", largest);
    this.#uploadStaged();
    const planOf = new Map(plans.map((p) => [p.module, p]));
    const transaction = this.#host!.begin?.();
    // From here on every touched weight counts as changed, so that the next switch repairs what a failure leaves behind.
    this.#changed = new Set(touched);
    try {
      for (const index of touched) {
        const slot = this.#slots[index]!;
        const out = at(slot.active ?? this.#scratch.get("weight")!);
        const fresh = read.get(index);
        if (fresh) this.#backend.upload(out, fresh);
        const base = fresh ? out : at(slot.pristine!);
        const plan = planOf.get(index);
        if (plan) this.#foldOne(plan, slot, base, out);
        else if (!fresh) this.#backend.copy(base, out, slot.weight.byteLength);
        this.#dispatches++;
        if (!transaction) continue;
        const data = this.#backend.view(out, slot.weight.byteLength);
        const written = transaction.write(slot.weight.name, { dtype: slot.weight.dtype, shape: slot.weight.shape, data, byteOffset: 0 });
        if (written) await written;
      }
      if (!transaction) return;
      for (const [name, { added }] of this.#parameters.active) {
        if (replacements.has(name)) continue;
        await transaction.write(name, added ? null : this.#parameters.pristine(name)!);
      }
      for (const [name, { view }] of replacements) await transaction.write(name, view);
      await transaction.commit();
    } catch (error) {
      await transaction?.rollback();
      throw error;
    }
  }

  #foldOne(plan: ModulePlan, slot: Slot, base: Slice, out: Slice): void {
    const { module } = slot;
    const { transposed, dtype: type } = slot.weight;
    const [A, B] = this.#expand(plan, module);
    const job: Omit<FoldJob, "out"> = {
      base,
      type,
      rows: transposed ? module.in : module.out,
      columns: transposed ? module.out : module.in,
      stride: transposed ? module.out : module.in,
      left: transposed ? A : B,
      right: transposed ? B : A,
      rank: plan.rank,
    };
    if (plan.magnitude === undefined) return this.#backend.fold({ ...job, out });
    const scale = this.#scale(plan, slot, job);
    this.#backend.fold({ ...job, out, ...(transposed ? { columnScale: scale } : { rowScale: scale }) });
  }

  /** DoRA's row scale [out] of the plan. */
  #scale(plan: ModulePlan, slot: Slot, job: Omit<FoldJob, "out">): Slice {
    const out = at(this.#scratch.get("scale")!);
    const magnitude = at(this.#scratch.get("coefficients")!, 4 * plan.magnitude!);
    this.#backend.scale({ ...job, out, magnitude, axis: slot.weight.transposed ? "columns" : "rows" });
    this.#dispatches++;
    return out;
  }

  /** A [rank, in] and Bᵀ [rank, out] of a plan, in scratch memory. */
  #expand(plan: ModulePlan, module: PackModule): [Slice, Slice] {
    const staged = this.#scratch.get("coefficients")!;
    return (["A", "B"] as const).map((side): Slice => {
      const block = this.#scratch.get(side)!;
      const width = side === "A" ? module.in : module.out;
      for (const { at: first, rows, basis, row } of plan[side].shared) {
        this.#backend.expand({
          out: at(block, 4 * row * width),
          coefficients: at(staged, 4 * first),
          basis: at(this.#basis, basis.tensor.byteOffset),
          type: basis.tensor.type,
          rank: rows,
          rows: basis.tensor.rows,
          width: basis.tensor.width,
        });
        this.#dispatches++;
      }
      for (const { at: first, row, q } of plan[side].private) {
        this.#backend.copy(at(staged, 4 * first), at(block, 4 * row * width), 4 * q * width);
        this.#dispatches++;
      }
      return at(block);
    }) as [Slice, Slice];
  }

  #unfold(plans: readonly ModulePlan[], read: ReadonlyMap<number, Uint8Array>): Map<number, Unfolded> {
    this.#reserveFactors(plans);
    for (const index of read.keys()) this.#reserve("weight", this.#slots[index]!.weight.byteLength);
    this.#uploadStaged();
    const unfolded = new Map<number, Unfolded>();
    for (const plan of plans) {
      const module = this.pack.modules[plan.module]!;
      const column = plan.A.shared.every((p) => p.basis.kind === "column") && plan.B.shared.every((p) => p.basis.kind === "column");
      const core = this.mode === "core" && column && plan.A.shared.length > 0;
      const own = plan.A.private.reduce((q, p) => q + p.q, 0);
      const rank = core ? own : plan.rank;
      const old = this.#unfolded.get(plan.module);
      const rows = Math.max(rank, 1);
      const [rowsA, rowsB] = [plan.A.shared[0]?.basis.tensor.rows ?? 0, plan.B.shared[0]?.basis.tensor.rows ?? 0];
      const term: Unfolded = {
        rank: rows,
        core: core ? zeros(old?.core, rowsA * rowsB) : undefined,
        A: zeros(old?.A, rows * module.in),
        B: zeros(old?.B, module.out * rows),
        rowScale: undefined,
      };
      if (term.core) addCore(term.core, plan, this.#staging.values, rowsA, rowsB);
      if (!core || plan.magnitude !== undefined) {
        const [A, B] = this.#expand(plan, module);
        if (!core) {
          term.A.set(this.#floats(A, plan.rank * module.in));
          transposeFactor(this.#floats(B, plan.rank * module.out), term.B, rows, module.out);
        }
        if (plan.magnitude !== undefined) term.rowScale = this.#rowScale(plan, A, B, read.get(plan.module)!);
      }
      if (core && own > 0) this.#copyPrivate(plan, module, term);
      unfolded.set(plan.module, term);
    }
    return unfolded;
  }

  #rowScale(plan: ModulePlan, A: Slice, B: Slice, weight: Uint8Array): Float32Array {
    const slot = this.#slots[plan.module]!;
    const { module } = slot;
    const { transposed, dtype: type } = slot.weight;
    const base = at(this.#scratch.get("weight")!);
    this.#backend.upload(base, weight);
    const [rows, columns] = transposed ? [module.in, module.out] : [module.out, module.in];
    const [left, right] = transposed ? [A, B] : [B, A];
    const job = { base, type, rows, columns, stride: columns, left, right, rank: plan.rank };
    return this.#floats(this.#scale(plan, slot, job), module.out).slice();
  }

  #copyPrivate(plan: ModulePlan, module: PackModule, term: Unfolded): void {
    let row = 0;
    plan.A.private.forEach(({ at: first, q }, i) => {
      const values = this.#staging.values;
      const b = plan.B.private[i]!.at;
      term.A.set(values.subarray(first, first + q * module.in), row * module.in);
      for (let k = 0; k < q; k++) {
        for (let o = 0; o < module.out; o++) term.B[o * term.rank + row + k] = values[b + k * module.out + o]!;
      }
      row += q;
    });
  }

  #floats(slice: Slice, count: number): Float32Array {
    const bytes = this.#backend.view(slice, 4 * count);
    return new Float32Array(bytes.buffer, bytes.byteOffset, count);
  }

  #reserveFactors(plans: readonly ModulePlan[]): void {
    const most = (size: (plan: ModulePlan, module: PackModule) => number): number =>
      Math.max(0, ...plans.map((plan) => size(plan, this.pack.modules[plan.module]!)));
    this.#reserve("coefficients", 4 * this.#staging.used);
    this.#reserve("A", 4 * most((plan, module) => plan.rank * module.in));
    this.#reserve("B", 4 * most((plan, module) => plan.rank * module.out));
    const scaled = most((plan, module) => (plan.magnitude === undefined ? 0 : module.out));
    if (scaled > 0) this.#reserve("scale", 4 * scaled);
  }

  #uploadStaged(): void {
    const { values, used } = this.#staging;
    this.#backend.upload(at(this.#scratch.get("coefficients")!), new Uint8Array(values.buffer, 0, 4 * used));
  }

  /** Scratch memory of at least `bytes`, kept from switch to switch. */
  #reserve(name: string, bytes: number): void {
    const held = this.#scratch.get(name);
    if (held && held.byteLength >= bytes) return;
    if (held) this.#backend.free(held);
    this.#scratch.delete(name);
    this.#scratch.set(name, this.#allocate(Math.max(bytes, 16), "scratch"));
  }

  #allocate(bytes: number, owner: Owner): Block {
    this.#allocated += bytes;
    return this.#backend.allocate(bytes, owner);
  }

  /**
   * A parameter of the model as the active task has it. Valid until the next switch; copy what has to last.
   * @param name of an adapted module ("encoder.layer.0.attention.self.query", with or without ".weight") or of a parameter
   *   that tasks bring ("classifier.weight")
   * @throws RangeError when no task of the pack changes such a parameter, or the active one does not have it
   */
  weight(name: string): View {
    this.#live();
    if (this.mode !== "folded") throw new TypeError(`weight: mode "${this.mode}" does not fold; use term("${name}")`);
    const found = this.#names.find(name);
    const parameter = "name" in found ? found.name : name;
    const replaced = this.#parameters.active.get(parameter) ?? this.#parameters.active.get(name);
    if (replaced) return replaced.view;
    const slot = this.#slotsByName.get(name) ?? this.#slotsByName.get(parameter);
    const host = this.#host!;
    if (host.begin) {
      if (host.view) return host.view(slot?.weight.name ?? parameter);
      throw new TypeError("weight: the weights live in the host this runtime was given; read them there");
    }
    if (slot) {
      const data = this.#backend.view(at(slot.active!), slot.weight.byteLength);
      return { dtype: slot.weight.dtype, shape: slot.weight.shape, data, byteOffset: 0 };
    }
    const pristine = this.#parameters.pristine(parameter);
    if (pristine) return pristine;
    const candidates = nearest(name, [...this.#slotsByName.keys(), ...this.#parameters.active.keys()]);
    throw new RangeError(`weight: "${name}" is not changed by the active task; nearest: ${candidates.join(", ") || "none"}`);
  }

  /**
   * What the active task does to a module, for a model that adds it itself; undefined where it leaves the module alone.
   * Valid until the next switch.
   * @param name module name as in `pack.modules`
   * @throws RangeError for a module the pack does not have, TypeError in mode "folded"
   */
  term(name: string): Term | undefined {
    this.#live();
    if (this.mode === "folded") throw new TypeError('term: mode "folded" has no terms; use weight()');
    const index = this.pack.modules.findIndex((m) => m.name === name);
    if (index < 0) {
      const candidates = nearest(name, this.pack.modules.map((m) => m.name));
      throw new RangeError(`term: no module "${name}"; nearest: ${candidates.join(", ") || "none"}`);
    }
    const module = this.pack.modules[index]!;
    const found = this.#names.find(`${name}.bias`);
    const bias = this.#parameters.active.get("name" in found ? found.name : `${name}.bias`)?.view;
    const term = this.#unfolded.get(index);
    if (!term && !bias) return undefined;
    const rank = term?.rank ?? 1;
    return {
      ...(term?.core ? { core: f32View(term.core, [module.A!.tensor.rows, module.B!.tensor.rows]) } : {}),
      A: f32View(term?.A ?? new Float32Array(module.in), [rank, module.in]),
      B: f32View(term?.B ?? new Float32Array(module.out), [module.out, rank]),
      ...(term?.rowScale ? { rowScale: f32View(term.rowScale, [module.out]) } : {}),
      ...(bias ? { bias } : {}),
    };
  }

  /**
   * Every parameter in which the model of the active task differs from the base, by the base's names: folded weights (mode
   * "folded", where the runtime holds them), heads, biases, token rows. Valid until the next switch.
   */
  changes(): ReadonlyMap<string, View> {
    this.#live();
    const views = new Map<string, View>();
    for (const index of this.mode === "folded" ? this.#changed : []) {
      const { name } = this.#slots[index]!.weight;
      views.set(name, this.weight(name));
    }
    for (const [name, { view }] of this.#parameters.active) views.set(name, view);
    return views;
  }

  /** Resident bytes by owner. Memory of the caller's own (a map of tensors, a host) is not counted. */
  memory(): MemoryReport {
    const { basis, coefficients, pristine, active, scratch, reserved } = this.#backend.memory();
    const held = this.pack.residentBytes;
    let unfolded = 0;
    for (const { core, A, B, rowScale } of this.#unfolded.values()) {
      for (const array of [core, A, B, rowScale]) unfolded += array?.byteLength ?? 0;
    }
    const report = {
      basis: basis + held.basis,
      coefficients: coefficients + held.coefficients,
      pristine: pristine + this.#parameters.pristineBytes,
      active: active + this.#parameters.activeBytes + unfolded,
      scratch: scratch + this.#staging.values.byteLength,
      reserved,
    };
    return { ...report, total: Object.values(report).reduce((a, b) => a + b, 0) };
  }

  /** Waits for switches under way, then frees everything. Weights in the caller's own memory stay as they are. */
  async dispose(): Promise<void> {
    await this.#queue;
    if (this.#disposed) return;
    this.#disposed = true;
    this.#backend.dispose();
    await this.#closeHost?.();
  }

  #live(): void {
    if (this.#disposed) throw new BackendError("this runtime is disposed; make a new one", { backend: this.backend });
  }
}

function checkFingerprint({ module, weight }: Slot, bytes: Uint8Array, bases: Uint8Array): void {
  const { name, dtype, transposed } = weight;
  if (module.fingerprint === undefined) return;
  const stored = new Float32Array(bases.slice(module.fingerprint, module.fingerprint + 256).buffer);
  const found = correlation(stored, fingerprint(module.name, bytes, dtype, module.out, module.in, transposed));
  if (found >= SAME_FLOAT) return;
  throw new BaseMismatchError(
    `the base's "${name}" is not the weight that "${module.name}" was trained on: their fingerprints correlate by ` +
      `${found.toFixed(4)}, at least ${SAME_FLOAT} is expected. Use the base of the adapters, or pass anyBase: true`,
    { module: module.name, expected: SAME_FLOAT, found },
  );
}

function toStrengths(selection: Selection): [string, number][] {
  if (selection === null) return [];
  if (typeof selection === "string") return [[selection, 1]];
  const strengths = Object.entries(selection);
  if (strengths.length === 0) throw new RangeError("switchTask: a blend without tasks; use null for the base");
  for (const [id, weight] of strengths) {
    if (Number.isFinite(weight)) continue;
    throw new RangeError(`switchTask: the strength of "${id}" is ${String(weight)}, expected a finite number`);
  }
  return strengths;
}

function at(block: Block, byteOffset = 0): Slice {
  return { block, byteOffset };
}

function f32View(values: Float32Array, shape: readonly number[]): View {
  return { dtype: "f32", shape, data: new Uint8Array(values.buffer, values.byteOffset, values.byteLength), byteOffset: 0 };
}

/** `old` cleared when it has the right length, else a new array: a warm switch allocates nothing. */
function zeros(old: Float32Array | undefined, length: number): Float32Array {
  return old?.length === length ? old.fill(0) : new Float32Array(length);
}

/** core[a, b] += Σ_r α_A[r, a] · α_B[r, b] for every task of the plan. */
function addCore(core: Float32Array, plan: ModulePlan, staged: Float32Array, rowsA: number, rowsB: number): void {
  plan.A.shared.forEach(({ at: a0, rows }, i) => {
    const b0 = plan.B.shared[i]!.at;
    for (let r = 0; r < rows; r++) {
      for (let a = 0; a < rowsA; a++) {
        const x = staged[a0 + r * rowsA + a]!;
        for (let b = 0; b < rowsB; b++) core[a * rowsB + b]! += x * staged[b0 + r * rowsB + b]!;
      }
    }
  });
}

/** [rank, out] → [out, rank]. */
function transposeFactor(from: Float32Array, to: Float32Array, rank: number, out: number): void {
  const rows = from.length / out;
  for (let k = 0; k < rows; k++) for (let o = 0; o < out; o++) to[o * rank + k] = from[k * out + o]!;
}
