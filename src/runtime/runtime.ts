/**
 * The runtime: one pack on one base model, and which task is active. It owns what is resident, orders switches and makes
 * each of them happen as a whole or not at all. The arithmetic is the backend's, the bytes are the pack's, the weights are
 * the host's.
 */
import type { DeviceHandle, Owner, Slice } from "../backends/backend.ts";
import { byteLengthOf, onDevice, type View, type WeightHost } from "../base/host.ts";
import type { Locator } from "../base/locate.ts";
import { nearest } from "../base/names.ts";
import { BackendError } from "../errors.ts";
import type { Pack } from "../pack/pack.ts";
import type { Applied } from "./apply.ts";
import { Parameters, type Replacement } from "./parameters.ts";
import { copySelection, loadParts, refuseMagnitudes, type Selection } from "./selection.ts";
import { readWeight, type Slot } from "./slots.ts";
import { type ModulePlan, stage } from "./stage.ts";
import type { BaseWeight, Unfolded } from "./unfold.ts";
import { at, type Workbench } from "./workbench.ts";

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

/** What lives and dies with a backend. */
export interface Started {
  bench: Workbench;
  passedOver: readonly string[];
  /** Parameters beside the adapted weights are read and written here. */
  host: WeightHost | undefined;
}

/** What stays. */
export interface RuntimeParts {
  pack: Pack;
  mode: Runtime["mode"];
  policy: Runtime["policy"];
  slots: readonly Slot[];
  locator: Locator;
  ignored: ReadonlySet<string>;
  closeHost: (() => Promise<void>) | undefined;
  /** Another backend in place of one whose device was lost. */
  restart: (() => Promise<Started>) | undefined;
}

/** A pack at work. Made by `createRuntime`. */
export class Runtime {
  readonly pack: Pack;
  readonly mode: "folded" | "factors" | "core";
  readonly policy: "copy" | "reload";
  /** Why backends before the one that runs were not used. */
  readonly passedOver: readonly string[];

  #bench: Workbench;
  #host: WeightHost | undefined;
  readonly #slotsByName = new Map<string, Slot>();
  readonly #parameters: Parameters;
  readonly #parts: RuntimeParts;
  /** Modules, by index, that are not pristine now. */
  #changed = new Set<number>();
  #unfolded = new Map<number, Unfolded>();
  #applied: Applied | undefined;
  #task: Selection = null;
  /** Of the active task. */
  #head: string | undefined;
  /** Why the device is gone, until another one is at work. */
  #loss: Error | undefined;
  #queue: Promise<unknown> = Promise.resolve();
  #disposed = false;

  /** Use `createRuntime`. */
  constructor(parts: RuntimeParts, { bench, passedOver, host }: Started) {
    const { pack, mode, policy, slots, locator } = parts;
    this.pack = pack;
    this.mode = mode;
    this.policy = policy;
    this.passedOver = passedOver;
    this.#parts = parts;
    this.#bench = bench;
    this.#host = host;
    this.#parameters = new Parameters(host, locator);
    for (const slot of slots) {
      for (const name of [slot.weight.name, slot.module.name]) {
        this.#slotsByName.set(name, slot);
        this.#slotsByName.set(name.replace(/\.weight$/, ""), slot);
      }
    }
    this.#watch();
  }

  /** Which backend runs, for instance "wasm (simd)". */
  get backend(): string {
    const { name, variant } = this.#bench.backend;
    return name === "js" ? "js" : `${name} (${variant})`;
  }

  /** The WebGPU device that it runs on; another one after a loss, where `webgpu.recreate` asks for that. */
  get device(): DeviceHandle | undefined {
    return this.#bench.backend.device;
  }

  #watch(): void {
    const { backend } = this.#bench;
    void backend.lost?.then((reason) => {
      if (this.#disposed || this.#bench.backend !== backend) return;
      this.#loss = reason;
      if (!this.#parts.restart) return;
      this.#enqueue(() => this.#recover()).catch(() => undefined);
    });
  }

  /** Where the device is gone: gets another one and brings the active task back. @throws BackendError when it cannot */
  async #recover(): Promise<void> {
    if (!this.#loss || this.#disposed) return;
    if (!this.#parts.restart) throw this.#loss;
    this.#bench.backend.close();
    const { bench, host } = await this.#parts.restart();
    this.#bench = bench;
    this.#host = this.#parameters.host = host;
    this.#changed.clear();
    this.#applied = undefined;
    this.#loss = undefined;
    this.#watch();
    await this.#switch(this.#task, this.#head === undefined ? {} : { head: this.#head });
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
    return this.#enqueue(() => this.#switch(selection, options));
  }

  #enqueue<T>(work: () => Promise<T>): Promise<T> {
    const run = this.#queue.then(work);
    this.#queue = run.catch(() => undefined);
    return run;
  }

  async #switch(selection: Selection, { signal, head }: SwitchOptions): Promise<SwitchReport> {
    const started = performance.now();
    this.#live();
    if (this.#loss) await this.#recover();
    signal?.throwIfAborted();
    const before = { ...this.pack.reads };
    const parts = await loadParts(this.pack, selection, head, signal, this.#parts.ignored);
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
    this.#head = head;
    const done = performance.now();
    const named = (added: boolean): string[] =>
      [...replacements].filter(([, r]) => r.added === added).map(([name]) => name);
    return {
      task: this.#task,
      bytesRead: this.pack.reads.bytes - before.bytes,
      requests: this.pack.reads.requests - before.requests,
      modules: touched.size,
      dispatches: this.#bench.dispatches,
      allocated,
      added: named(true),
      replaced: named(false),
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
      const slot = this.#parts.slots[index]!;
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
    const { slots } = this.#parts;
    bench.prepare(plans);
    // Weights that the host holds in the CPU's memory pass through here.
    const passing = [...touched].filter((index) => !slots[index]!.active);
    const passage = bench.reserve("weight", Math.max(0, ...passing.map((index) => slots[index]!.weight.byteLength)));
    const planOf = new Map(plans.map((p) => [p.module, p]));
    const fold = (index: number): Slice => {
      const { weight, pristine, active } = slots[index]!;
      const out = active ?? passage;
      const fresh = read.get(index);
      if (fresh) bench.backend.upload(out, fresh);
      const base = fresh ? out : at(pristine!);
      const plan = planOf.get(index);
      if (plan) bench.fold(plan, weight, base, out);
      else if (!fresh) bench.copy(base, out, weight.byteLength);
      return out;
    };
    // From here on every touched weight counts as changed, so that the next switch repairs what a failure leaves behind.
    this.#changed = new Set(touched);
    for (const index of touched) if (slots[index]!.active) fold(index);
    if (!this.#host!.begin) return;
    // A device is waited for before the host's weights change, which then happens without a pause.
    const fetched = new Map<number, Uint8Array>();
    if (bench.backend.read) {
      for (const index of passing)
        fetched.set(index, await bench.backend.read(fold(index), slots[index]!.weight.byteLength));
      await bench.backend.finish();
    }
    const transaction = this.#host!.begin();
    try {
      for (const index of passing) {
        const { name, dtype, shape, byteLength } = slots[index]!.weight;
        const data = fetched.get(index) ?? bench.backend.view!(fold(index), byteLength);
        const written = transaction.write(name, { dtype, shape, data, byteOffset: 0 });
        if (written) await written;
      }
      for (const [name, { added }] of this.#parameters.active) {
        if (replacements.has(name)) continue;
        await transaction.write(name, added ? null : this.#parameters.pristine(name)!);
      }
      for (const [name, { view }] of replacements) await transaction.write(name, view);
      await transaction.commit();
    } catch (error) {
      await transaction.rollback();
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
    const { unfold, unfoldOnDevice } = await import("./unfold.ts");
    const weightOf = (module: number): BaseWeight => ({
      weight: this.#parts.slots[module]!.weight,
      bytes: read.get(module)!,
    });
    const all = [plans, this.#bench, this.pack.modules, mode, this.#unfolded, weightOf] as const;
    this.#unfolded = this.#bench.backend.view ? unfold(...all) : await unfoldOnDevice(...all);
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
    const found = this.#parts.locator.names.find(name);
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
      const { block, byteOffset } = slot.active!;
      const data = block.device ?? this.#bench.backend.view!(slot.active!, slot.weight.byteLength);
      return { dtype: slot.weight.dtype, shape: slot.weight.shape, data, byteOffset };
    }
    const pristine = this.#parameters.pristine(parameter);
    if (pristine) return pristine;
    const candidates = nearest(name, [...this.#slotsByName.keys(), ...this.#parameters.active.keys()]);
    throw new RangeError(`weight: "${name}" is not changed by the active task; nearest: ${candidates.join(", ")}`);
  }

  /**
   * As `weight`, in the CPU's memory: what lies on a device is copied from there.
   * @throws RangeError, TypeError as `weight`; BackendError when the device fails
   */
  async readWeight(name: string): Promise<View & { data: Uint8Array }> {
    const view = this.weight(name);
    const { data, byteOffset } = view;
    if (!onDevice(data)) return { ...view, data };
    const { backend } = this.#bench;
    const bytes = await backend.read!({ block: backend.adopt!(data), byteOffset }, byteLengthOf(view));
    return { ...view, data: bytes, byteOffset: 0 };
  }

  /**
   * What the active task does to a module, for a model that adds it itself; undefined where it leaves the module alone.
   * Valid until the next switch.
   * @param name module name as in `pack.modules`
   * @throws RangeError for a module the pack does not have, TypeError in mode "folded"
   */
  term(name: string): Term | undefined {
    this.#live();
    const index = this.#indexOf(name);
    const module = this.pack.modules[index]!;
    const found = this.#parts.locator.names.find(`${name}.bias`);
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

  /** Of a module, where its term stands beside the weight. */
  #indexOf(name: string): number {
    if (this.mode === "folded") throw new TypeError('mode "folded" has no terms; use weight()');
    const index = this.pack.modules.findIndex((m) => m.name === name);
    if (index >= 0) return index;
    const candidates = nearest(
      name,
      this.pack.modules.map((m) => m.name),
    );
    throw new RangeError(`no module "${name}"; nearest: ${candidates.join(", ")}`);
  }

  /**
   * y += x·ΔWᵀ, the low-rank term of a linear layer for a batch, of the active task or of one task per row. Arrays of the CPU
   * are ready when it resolves; buffers of the runtime's device when what is submitted to it before is done. Biases and heads
   * are not in it: `term(name).bias`, `changes()`.
   * @param name module name as in `pack.modules`
   * @param x f32 [rows, …, in]
   * @param y f32 [rows, …, out], added to
   * @param tasks by row; null leaves a row as it is
   * @throws TaskError for an unknown task or one with DoRA on this module; TypeError, RangeError when shapes do not fit
   * @example
   * await runtime.apply("bert.encoder.layer.0.attention.self.query", x, y, { tasks: ["sst2", null, "cola"] });
   */
  apply(name: string, x: View, y: View, { tasks }: { tasks?: readonly (string | null)[] } = {}): Promise<void> {
    return this.#enqueue(async () => {
      this.#live();
      if (this.#loss) await this.#recover();
      const index = this.#indexOf(name);
      const { apply, partsOfRows } = await import("./apply.ts");
      const rows = await partsOfRows(this.pack, tasks ?? [this.#task], index);
      this.#applied = await apply(this.#bench, this.pack.modules, index, rows, x, y, this.#applied);
    });
  }

  /**
   * Every parameter in which the model of the active task differs from the base, by the base's names: folded weights (mode
   * "folded", where the runtime holds them), heads, biases, token rows. Valid until the next switch.
   */
  changes(): ReadonlyMap<string, View> {
    this.#live();
    const views = new Map<string, View>();
    for (const index of this.mode === "folded" ? this.#changed : []) {
      const { name } = this.#parts.slots[index]!.weight;
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
  async close(): Promise<void> {
    await this.#queue;
    if (this.#disposed) return;
    this.#disposed = true;
    this.#bench.backend.close();
    await this.#parts.closeHost?.();
  }

  #live(): void {
    if (this.#disposed) throw new BackendError("this runtime is disposed; make a new one", { backend: this.backend });
  }
}

function f32View(values: Float32Array, shape: readonly number[]): View {
  return {
    dtype: "f32",
    shape,
    data: new Uint8Array(values.buffer, values.byteOffset, values.byteLength),
    byteOffset: 0,
  };
}
