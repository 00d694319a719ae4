/**
 * The runtime: one pack on one base model, and which task is active. It owns what is resident, orders switches and makes
 * each of them happen as a whole or not at all. The arithmetic is the backend's, the bytes are the pack's, the weights are
 * the host's.
 */
import type { Owner, Slice } from "../backends/backend.ts";
import { createBackend, type BackendOptions } from "../backends/select.ts";
import { BackendError } from "../errors.ts";
import { nearest, type NameMatcher } from "../names.ts";
import type { Pack } from "../pack/pack.ts";
import type { FetchOptions } from "../source.ts";
import { openHost, type BaseInput, type View, type WeightHost } from "./host.ts";
import { Locator } from "./locate.ts";
import { Parameters, type Replacement } from "./parameters.ts";
import { findSlots, loadSlots, readWeight, type Slot } from "./slots.ts";
import { copySelection, loadParts, refuseMagnitudes, type Selection } from "./selection.ts";
import { stage, type ModulePlan } from "./stage.ts";
import type { Unfolded } from "./unfold.ts";
import { at, Workbench } from "./workbench.ts";

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
  /** Parameters of tasks that are left out, by the pack's names: "classifier.weight". */
  ignore?: Iterable<string>;
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
  /** Bytes of new memory for weights, factors and parameters; 0 once warm. */
  allocated: number;
  /** Parameters the task brings that the base lacks. */
  added: string[];
  /** Parameters replaced whole: heads, biases, token rows. */
  replaced: string[];
  milliseconds: { read: number; compute: number; total: number };
}

/** What the active task does to one module, for a model that adds it itself (docs/runtime.md, "Unfolded"). */
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
    const bench = new Workbench(backend, pack.modules, bases);
    const folded = mode === "folded";
    const keep = { pristine: folded && policy === "copy", active: folded && !host?.begin };
    if (host) await loadSlots(slots, host, bench, bases, keep, { signal, anyBase: options.anyBase ?? false });
    // A device that has no memory left says so only now.
    await backend.finish();
    const ignored = new Set(options.ignore);
    return new Runtime({ pack, bench, passedOver, mode, policy, host, slots, locator, ignored, closeHost });
  } catch (error) {
    backend.dispose();
    await closeHost?.();
    throw error;
  }
}

interface RuntimeParts {
  pack: Pack;
  bench: Workbench;
  passedOver: readonly string[];
  mode: Runtime["mode"];
  policy: Runtime["policy"];
  host: WeightHost | undefined;
  slots: readonly Slot[];
  locator: Locator;
  ignored: ReadonlySet<string>;
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

  readonly #bench: Workbench;
  readonly #host: WeightHost | undefined;
  readonly #slots: readonly Slot[];
  readonly #slotsByName = new Map<string, Slot>();
  readonly #parameters: Parameters;
  readonly #ignored: ReadonlySet<string>;
  readonly #closeHost: (() => Promise<void>) | undefined;
  readonly #names: NameMatcher;
  /** Modules, by index, that are not pristine now. */
  #changed = new Set<number>();
  #unfolded = new Map<number, Unfolded>();
  #task: Selection = null;
  #queue: Promise<unknown> = Promise.resolve();
  #disposed = false;

  /** Use `createRuntime`. */
  constructor(parts: RuntimeParts) {
    const { host, locator, slots } = parts;
    const { backend } = parts.bench;
    this.pack = parts.pack;
    this.backend = backend.name === "js" ? "js" : `${backend.name} (${backend.variant})`;
    this.passedOver = parts.passedOver;
    this.mode = parts.mode;
    this.policy = parts.policy;
    this.#bench = parts.bench;
    this.#host = host;
    this.#ignored = parts.ignored;
    this.#closeHost = parts.closeHost;
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
    const parts = await loadParts(this.pack, selection, head, signal, this.#ignored);
    if (!this.#host) refuseMagnitudes(parts, this.pack, () => true, "pass `base`");
    const replacements = await this.#parameters.resolve(parts, this.pack, head, signal);
    const plans = stage(parts, this.pack.modules, this.#bench.staging);
    const touched = new Set([...this.#changed, ...plans.map((p) => p.module)]);
    const pristine = await this.#readPristine(plans, touched, signal);
    const read = performance.now();
    signal?.throwIfAborted();

    this.#bench.allocated = 0;
    this.#bench.dispatches = 0;
    if (this.mode === "folded") await this.#fold(plans, touched, pristine, replacements);
    else await this.#unfold(plans, this.mode, pristine);
    await this.#bench.backend.finish();
    const allocated = this.#bench.allocated + this.#parameters.allocated;
    this.#parameters.activate(replacements);
    this.#changed = new Set(plans.map((p) => p.module));
    this.#task = copySelection(selection);
    const done = performance.now();
    return {
      task: this.#task,
      bytesRead: this.pack.reads.bytes - before.bytes,
      requests: this.pack.reads.requests - before.requests,
      modules: touched.size,
      dispatches: this.#bench.dispatches,
      allocated,
      added: [...replacements].filter(([, r]) => r.added).map(([name]) => name),
      replaced: [...replacements].filter(([, r]) => !r.added).map(([name]) => name),
      milliseconds: { read: read - started, compute: done - read, total: done - started },
    };
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
      if (!slot.pristine) read.set(index, await readWeight(this.#host!, slot, undefined, { signal }));
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
    const bench = this.#bench;
    bench.prepare(plans);
    const passing = [...touched].map((i) => this.#slots[i]!).filter((slot) => !slot.active);
    const passage = bench.reserve("weight", Math.max(0, ...passing.map((slot) => slot.weight.byteLength)));
    const planOf = new Map(plans.map((p) => [p.module, p]));
    const fold = (index: number): Slice => {
      const { weight, pristine, active } = this.#slots[index]!;
      const out = active ? at(active) : passage;
      const fresh = read.get(index);
      if (fresh) bench.backend.upload(out, fresh);
      const base = fresh ? out : at(pristine!);
      const plan = planOf.get(index);
      if (plan) bench.fold(plan, weight, base, out);
      else if (!fresh) bench.copy(base, out, weight.byteLength);
      return out;
    };
    // A device is waited for before the host's weights change, which then happens without a pause.
    const fetched = new Map<number, Uint8Array>();
    if (this.#host!.begin && bench.backend.read) {
      for (const index of touched) {
        fetched.set(index, await bench.backend.read(fold(index), this.#slots[index]!.weight.byteLength));
      }
    }
    const transaction = this.#host!.begin?.();
    // From here on every touched weight counts as changed, so that the next switch repairs what a failure leaves behind.
    this.#changed = new Set(touched);
    try {
      for (const index of touched) {
        const { name, dtype, shape, byteLength } = this.#slots[index]!.weight;
        let data = fetched.get(index);
        if (!data) {
          const out = fold(index);
          if (!transaction) continue;
          data = bench.backend.view!(out, byteLength);
        }
        const written = transaction!.write(name, { dtype, shape, data, byteOffset: 0 });
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

  /** The terms of the plans. Once the code is there, without a pause but on a device, so that nobody sees half of them. */
  async #unfold(
    plans: readonly ModulePlan[],
    mode: "core" | "factors",
    read: ReadonlyMap<number, Uint8Array>,
  ): Promise<void> {
    // Apps that fold do without.
    const { fetchFactors, fetchFloats, unfold } = await import("./unfold.ts");
    const bench = this.#bench;
    bench.prepare(plans);
    const base = bench.reserve("weight", Math.max(0, ...[...read.values()].map((bytes) => bytes.length)));
    const { modules } = this.pack;
    const factors = bench.backend.view ? undefined : await fetchFactors(plans, bench, modules, mode);
    this.#unfolded = unfold(plans, bench, modules, mode, this.#unfolded, factors);
    for (const plan of plans) {
      if (plan.magnitude === undefined) continue;
      const { module, weight } = this.#slots[plan.module]!;
      bench.backend.upload(base, read.get(plan.module)!);
      const scale = bench.rowScale(plan, weight, base);
      this.#unfolded.get(plan.module)!.rowScale = bench.backend.view
        ? bench.floats(scale, module.out).slice()
        : await fetchFloats(bench, scale, module.out);
    }
  }

  /**
   * A parameter of the model as the active task has it. Valid until the next switch; copy what has to last. A weight that the
   * runtime holds on a device is that device's buffer.
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
      throw new TypeError("weight: the weights are in the host you passed; read them there");
    }
    if (slot) {
      const block = slot.active!;
      const data = block.device ?? this.#bench.backend.view!(at(block), slot.weight.byteLength);
      return { dtype: slot.weight.dtype, shape: slot.weight.shape, data, byteOffset: 0 };
    }
    const pristine = this.#parameters.pristine(parameter);
    if (pristine) return pristine;
    const candidates = nearest(name, [...this.#slotsByName.keys(), ...this.#parameters.active.keys()]);
    throw new RangeError(`weight: "${name}" is not changed by the active task; nearest: ${candidates.join(", ") || "none"}`);
  }

  /**
   * As `weight`, in the CPU's memory: what lies on a device is copied from there.
   * @throws RangeError, TypeError as `weight`; BackendError when the device fails
   */
  async readWeight(name: string): Promise<View & { data: Uint8Array }> {
    const view = this.weight(name);
    const block = this.#slots.find(({ active }) => active?.device === view.data)?.active;
    const data = block ? await this.#bench.backend.read!(at(block), block.byteLength) : view.data;
    return { ...view, data: data as Uint8Array };
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
    const { basis, coefficients, pristine, active, scratch, reserved } = this.#bench.backend.memory();
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
      scratch: scratch + this.#bench.staging.values.byteLength,
      reserved,
    };
    return { ...report, total: Object.values(report).reduce((a, b) => a + b, 0) };
  }

  /** Waits for switches under way, then frees everything. Weights in the caller's own memory stay as they are. */
  async dispose(): Promise<void> {
    await this.#queue;
    if (this.#disposed) return;
    this.#disposed = true;
    this.#bench.backend.dispose();
    await this.#closeHost?.();
  }

  #live(): void {
    if (this.#disposed) throw new BackendError("this runtime is disposed; make a new one", { backend: this.backend });
  }
}

function f32View(values: Float32Array, shape: readonly number[]): View {
  return { dtype: "f32", shape, data: new Uint8Array(values.buffer, values.byteOffset, values.byteLength), byteOffset: 0 };
}
