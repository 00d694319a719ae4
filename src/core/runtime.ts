/**
 * The runtime: one pack on one base model, and which task is active. `createRuntime` opens the base, finds the adapted weights in it and picks
 * the backend that they go to. It owns what is resident, orders switches and makes
 * each of them happen as a whole or not at all. The arithmetic is the backend's, the bytes are the pack's, the weights are
 * the host's.
 */
/// <reference lib="esnext.disposable" preserve="true" />
import { checkChoice, checkOptions, checkPack, nearest } from "../arguments.ts";
import type { Backend, DeviceHandle } from "../backends/backend.ts";
import { type BackendOptions, createBackend } from "../backends/select.ts";
import { BackendError } from "../errors.ts";
import { now, pacer, throwIfAborted } from "../pace.ts";
import { Changes } from "../queue.ts";
import { FETCH_OPTIONS, type FetchOptions } from "../source.ts";
import { type BaseInput, type CpuView, onDevice, type View, type WeightHost, WeightResolver } from "./base.ts";
import { type ActiveTask, KernelSession, planTasks, type Started } from "./kernel-session.ts";
import type { Pack } from "./pack.ts";
import type { Parameters, Replacement, Resolved } from "./parameters.ts";
import type { ModuleFilter, PackView } from "./part.ts";
import {
  copySelection,
  type LoadedTasks,
  loadParts,
  type MemoryReport,
  memoryReport,
  type RuntimeSwitchReport,
  type Selection,
  Switching,
  type SwitchOptions,
} from "./selection.ts";
import type { ActiveTerms, ApplyOptions, ModuleTerm } from "./terms.ts";
import {
  bindWeights,
  FoldedWeights,
  loadWeights,
  type TaskWriter,
  type WeightBinding,
  type WeightChange,
} from "./weights.ts";

const NOTHING: Resolved = { parameters: new Map(), weights: new Map(), tables: new Set(), added: [], replaced: [] };

/** A selection, read: what it does to the model. Nothing is changed yet. */
interface Loaded {
  readonly parts: readonly ActiveTask[];
  readonly resolved: Resolved;
  readonly change: WeightChange;
}

/** A pack at work. Made by `createRuntime`. */
export class Runtime extends Switching<RuntimeSwitchReport> {
  readonly pack: Pack;
  readonly mode: "folded" | "factors" | "core";
  readonly policy: "copy" | "reload";
  /** Why backends before the one that runs were not used. */
  readonly passedOver: readonly string[];

  #kernels: KernelSession;
  #host: WeightHost | undefined;
  readonly #bindingsByName = new Map<string, WeightBinding>();
  /** Made when a task first brings some. */
  #parameters: Parameters | undefined;
  readonly #parts: RuntimeParts;
  readonly #weights: FoldedWeights;
  /** Active selection with its tasks: the pack may have others under their ids by now, or be out of reach. */
  #now: LoadedTasks = { selection: null, head: undefined, tasks: [] };
  /** Why the device is gone, until another one is at work. */
  #loss: Error | undefined;
  readonly #queue = new Changes();
  #closed = false;

  /** @internal Use `createRuntime`. */
  constructor(parts: RuntimeParts, { kernels, passedOver, host }: Started) {
    super();
    const { pack, mode, policy, bindings } = parts;
    this.pack = pack;
    this.mode = mode;
    this.policy = policy;
    this.passedOver = passedOver;
    this.#parts = parts;
    this.#kernels = kernels;
    this.#host = host;
    this.#weights = new FoldedWeights(bindings);
    for (const binding of bindings)
      for (const { name } of [binding.weight, binding.module]) this.#bindingsByName.set(moduleName(name), binding);
    this.#watch();
  }

  /** Which backend runs, for instance "wasm (simd)". */
  get backend(): string {
    const { name, variant } = this.#kernels.backend;
    return name === "js" ? "js" : `${name} (${variant})`;
  }

  /** The WebGPU device that it runs on; another one after a loss, where `webgpu.recreate` asks for that. */
  get device(): DeviceHandle | undefined {
    return this.#kernels.backend.device;
  }

  #watch(): void {
    const { backend } = this.#kernels;
    // Engines without WeakRef have no devices.
    if (!backend.lost) return;
    // A device may live on after many runtimes, and would keep them.
    const runtime = new WeakRef(this);
    const used = new WeakRef(backend);
    void backend.lost.then((reason) => {
      const still = runtime.deref();
      if (!still || still.#closed || still.#kernels.backend !== used.deref()) return;
      still.#loss = reason;
      still.tell("devicelost", { message: reason.message });
      if (still.#parts.restart) still.#queue.change(() => still.#recover()).catch(() => undefined);
    });
  }

  /** Replaces a device that is gone, and brings the active task back. @throws BackendError when it cannot */
  async #recover(): Promise<void> {
    if (!this.#loss || this.#closed) return;
    if (!this.#parts.restart) throw this.#loss;
    this.#kernels.backend.close();
    const { kernels, host } = await this.#parts.restart();
    this.#kernels = kernels;
    this.#host = host;
    this.#weights.restart();
    this.#loss = undefined;
    this.#watch();
    await this.#switch(this.#now.selection, this.#now, this.#now.tasks);
  }

  /** The active task. */
  get task(): Selection {
    return this.#now.selection;
  }

  /**
   * Makes a task, a blend or the pristine base active. Calls are queued. Long work lets the event loop have a turn now and then:
   * wait for the switch before the weights are used. When it fails or is aborted, the previous task stays whole, or is made
   * whole again; where a host does not let that be, nothing is read until another switch has succeeded.
   * @param selection a task id; null for the base; or strengths by id, W0 + Σ strength · ΔW
   * @throws TaskError for an unknown id (naming the nearest), a blend with DoRA, heads that cannot be blended
   * @throws SourceError, FormatError when the task's blob cannot be read or is damaged
   * @throws BackendError when it failed and the previous task could not be put back either; `cause` has both errors
   * @example
   * await runtime.switchTask("sst2");
   * await runtime.switchTask({ sst2: 0.7, cola: 0.3 });
   * await runtime.switchTask(null);
   */
  async switchTask(selection: Selection, options: SwitchOptions = {}): Promise<RuntimeSwitchReport> {
    checkOptions("switchTask", options, ["signal", "head"]);
    return this.activate(copySelection(selection), options);
  }

  /** @internal @param tasks of the selection, where they have been loaded */
  activate(selection: Selection, options: SwitchOptions, tasks?: readonly ActiveTask[]): Promise<RuntimeSwitchReport> {
    return this.#queue.change(() => this.switching(selection, () => this.#switch(selection, options, tasks)));
  }

  /** @internal @throws BackendError while the weights are no task's */
  check(): void {
    this.#live();
    this.#weights.check();
  }

  async #switch(
    selection: Selection,
    options: SwitchOptions,
    tasks?: readonly ActiveTask[],
  ): Promise<RuntimeSwitchReport> {
    const started = now();
    const { signal, head } = options;
    await this.#ready();
    throwIfAborted(signal);
    const before = { ...this.pack.reads };
    const { parts, resolved, change } = await this.#load(selection, options, tasks);
    const read = now();
    throwIfAborted(signal);
    this.#kernels.allocated = 0;
    this.#kernels.dispatches = 0;
    const pristine = (name: string): CpuView | undefined => this.#parameters?.pristine(name);
    const { selection: formerly, tasks: former, ...how } = this.#now;
    const activate = await this.#writer.write(
      change,
      { kernels: this.#kernels, host: this.#host!, pristine },
      async () => (await this.#load(formerly, how, former)).change,
      signal,
    );
    const allocated = this.#kernels.allocated + (this.#parameters?.allocated ?? 0);
    // No pause from here on: a reader in between would see one task's weights and another one's head.
    activate();
    this.#parameters?.activate(resolved);
    this.#now = { selection, head, tasks: parts };
    const done = now();
    return {
      task: selection,
      bytesRead: this.pack.reads.bytes - before.bytes,
      requests: this.pack.reads.requests - before.requests,
      modules: change.weights.size,
      dispatches: this.#kernels.dispatches,
      allocated,
      added: resolved.added,
      replaced: resolved.replaced,
      milliseconds: { read: read - started, compute: done - read, total: done - started },
    };
  }

  /** Reads everything that a switch needs, before anything is changed. */
  async #load(selection: Selection, options: SwitchOptions, tasks?: readonly ActiveTask[]): Promise<Loaded> {
    const { view, ignored } = this.#parts;
    const pause = pacer(options.signal);
    const parts = tasks ?? (await loadParts(view, selection, options, ignored));
    if (!this.#host) this.#parts.terms?.checkUnbased(view, parts);
    const { signal } = options;
    const resolved = await this.#resolve(parts, signal);
    const plans = planTasks(parts, view.modules, this.#kernels.buffer);
    const turn = pause();
    if (turn) await turn;
    return { parts, resolved, change: await this.#writer.prepare(plans, resolved, this.#host!, signal) };
  }

  /** Parameters that the tasks override, apart from their terms. */
  async #resolve(parts: readonly ActiveTask[], signal: AbortSignal | undefined): Promise<Resolved> {
    if (!parts.some(({ blob }) => blob.parameters.length > 0)) return NOTHING;
    const { resolver, bindings, ignored } = this.#parts;
    this.#parameters ??= new (await import("./parameters.ts")).Parameters(resolver, bindings, ignored);
    const base = { host: this.#host, kernels: this.#kernels, folded: !this.#parts.terms };
    return this.#parameters.resolve(parts, this.#parts.view, base, signal);
  }

  /** Parameters of the active task. */
  get #active(): ReadonlyMap<string, Replacement> {
    return this.#parameters?.active ?? NOTHING.parameters;
  }

  get #writer(): TaskWriter {
    return this.#parts.terms ?? this.#weights;
  }

  /**
   * A parameter of the model as the active task has it. Valid until the next switch; copy what has to last. A weight that the
   * runtime holds on a device is that device's buffer.
   * @param name of an adapted module ("encoder.layer.0.attention.self.query", with or without ".weight") or of a parameter
   *   that tasks bring ("classifier.weight")
   * @throws RangeError when no task of the pack changes such a parameter, or the active one does not have it
   * @throws BackendError while a switch is under way, and where one failed and the task before it could not be put back
   */
  weight(name: string): View {
    this.#live();
    if (this.mode !== "folded") throw new TypeError(`weight: mode "${this.mode}" does not fold; use term("${name}")`);
    this.#weights.check();
    const parameter = this.#parameterName(name);
    const replaced = this.#active.get(parameter) ?? this.#active.get(name);
    if (replaced) return replaced.view;
    const binding = this.#bindingsByName.get(moduleName(name)) ?? this.#bindingsByName.get(moduleName(parameter));
    const { active, weight } = binding ?? {};
    const host = this.#host!;
    if (host.begin) {
      const view = host.view?.(weight?.name ?? parameter);
      if (view) return view;
      throw new TypeError("weight: the weights are in the host; read them there");
    }
    if (active && weight) {
      const data = active.block.device ?? this.#kernels.backend.view!(active, weight.byteLength);
      return { dtype: weight.dtype, shape: weight.shape, data, byteOffset: active.byteOffset };
    }
    const pristine = this.#parameters?.pristine(parameter);
    if (pristine) return pristine;
    const names = nearest(name, [...this.#bindingsByName.keys(), ...this.#active.keys()]).join(", ");
    throw new RangeError(`weight: "${name}" is not changed by the active task; nearest: ${names || "none"}`);
  }

  /**
   * Copies `weight` into the CPU's memory, from a device too. Waits for the switches asked for before, and those asked
   * for after wait for it.
   * @throws RangeError, TypeError as `weight`; BackendError when the device fails
   */
  readWeight(name: string): Promise<CpuView> {
    return this.#queue.change(async () => {
      const view = this.weight(name);
      return (await import("./device-host.ts")).copyView(this.#kernels.backend, view);
    });
  }

  /**
   * Term of the active task for a module, for a model that adds it itself; undefined where it leaves the module alone.
   * Valid until the next switch.
   * @param name module name as in `pack.modules`
   * @throws RangeError for a module the pack does not have, TypeError in mode "folded"
   */
  term(name: string): ModuleTerm | undefined {
    this.#live();
    return this.#terms.term(name, this.#parameters?.values(this.#parameterName(`${name}.bias`)));
  }

  /** The base's name of a parameter, where it has it. */
  #parameterName(name: string): string {
    const found = this.#parts.resolver.find(name);
    return "name" in found ? found.name : name;
  }

  get #terms(): ActiveTerms {
    if (this.#parts.terms) return this.#parts.terms;
    throw new TypeError('mode "folded" has no terms; use weight()');
  }

  /**
   * y += x·ΔWᵀ, the low-rank term of a linear layer for a batch, of the active task or of one task per row. Arrays of the CPU
   * are ready when it resolves; buffers of the runtime's device when what is submitted to it before is done. Biases and heads
   * are not in it: `term(name).bias`, `changes()`.
   * @param name module name as in `pack.modules`
   * @param x f32 [rows, …, in]
   * @param y f32 [rows, …, out], added to
   * @throws TaskError for an unknown task or one with DoRA on this module; TypeError, RangeError when shapes do not fit
   * @example
   * await runtime.apply("bert.encoder.layer.0.attention.self.query", x, y, { tasks: ["sst2", null, "cola"] });
   */
  async apply(name: string, x: View, y: View, options: ApplyOptions = {}): Promise<void> {
    checkOptions("apply", options, ["tasks"]);
    return this.#queue.change(async () => {
      await this.#ready();
      await this.#terms.apply(this.#parts, this.#kernels, this.#host, this.#now.tasks, name, x, y, options.tasks);
    });
  }

  /**
   * Every parameter in which the model of the active task differs from the base, by the base's names: folded weights (mode
   * "folded", where the runtime holds them), heads, biases, token rows. Valid until the next switch.
   * @throws BackendError as `weight`
   */
  changes(): ReadonlyMap<string, View> {
    this.#live();
    const views = new Map<string, View>();
    for (const index of this.mode === "folded" ? this.#weights.modules : []) {
      const { name } = this.#parts.bindings[index]!.weight;
      const view = this.#host!.begin ? this.#host!.view?.(name) : this.weight(name);
      if (view) views.set(name, view);
    }
    for (const [name, { view }] of this.#active) views.set(name, view);
    return views;
  }

  /** Resident bytes by owner. Memory of the caller's own (a map of tensors, a host) is not counted. */
  memory(): MemoryReport {
    const bytes = this.#kernels.backend.memory();
    const { basis, coefficients } = this.pack.residentBytes;
    bytes.basis += basis;
    bytes.coefficients += coefficients;
    bytes.pristine += this.#parameters?.pristineBytes ?? 0;
    bytes.active += (this.#parameters?.activeBytes ?? 0) + (this.#parts.terms?.byteLength ?? 0);
    bytes.scratch += this.#kernels.buffer.values.byteLength;
    return memoryReport(bytes);
  }

  /** Waits for switches under way, then frees everything. Weights in the caller's own memory stay as they are. */
  close(): Promise<void> {
    return this.#queue.change(async () => {
      if (this.#closed) return;
      this.#closed = true;
      this.#kernels.backend.close();
      await this.#parts.closeHost?.();
    });
  }

  #live(): void {
    if (this.#closed) throw new BackendError("this runtime is closed; make a new one", { backend: this.backend });
  }

  async #ready(): Promise<void> {
    this.#live();
    if (this.#loss) await this.#recover();
  }
}

/** A name with or without ".weight", without it. */
function moduleName(name: string): string {
  return name.replace(/\.weight$/, "");
}

/** State that outlives a lost device. */
export interface RuntimeParts {
  readonly pack: Pack;
  /** The modules of it that are used. */
  readonly view: PackView;
  readonly mode: "folded" | "factors" | "core";
  readonly policy: "copy" | "reload";
  readonly bindings: readonly WeightBinding[];
  readonly resolver: WeightResolver;
  readonly ignored: ReadonlySet<string>;
  /** Undefined in mode "folded". */
  readonly terms: ActiveTerms | undefined;
  readonly closeHost: (() => Promise<void>) | undefined;
  /** Starts another backend in place of one whose device was lost. */
  readonly restart: (() => Promise<Started>) | undefined;
}

/** Options of `createRuntime`. */
export interface RuntimeOptions extends BackendOptions, FetchOptions {
  /** The base model's weights. Needed for mode "folded"; in the others only for DoRA and for biases. */
  readonly base?: BaseInput;
  /**
   * `folded`: W0 + ΔW is written where the weights are. `factors`: A and B of the active task are handed out. `core`: the
   * product of the coefficients is handed out, for a model that has the components built in. Folded when there is a base.
   */
  readonly mode?: "folded" | "factors" | "core";
  /**
   * `copy` keeps the pristine weights in memory. `reload` reads them again at each switch: half the resident memory, for a
   * base that is a file. Default: `copy`.
   */
  readonly policy?: "copy" | "reload";
  /** Names of weights in the base, by module name of the pack, where matching by suffix does not find them. */
  readonly names?: ReadonlyMap<string, string>;
  /** Accept a base whose fingerprint differs, for instance one that was trained further. */
  readonly anyBase?: boolean;
  /** Parameters of tasks that are left out, by the pack's names: "classifier.weight". */
  readonly ignore?: Iterable<string>;
  /**
   * Which modules of the pack and of its tasks' parameters are used, by the pack's names. The others are left out: for a base that
   * lacks them, or is one of several files. Default: all.
   */
  readonly modules?: ModuleFilter;
  readonly signal?: AbortSignal;
}

/**
 * Loads the bases, finds the adapted weights in the base model and checks that it is the right one.
 * @throws BaseMismatchError when a module is missing, ambiguous, of another shape or of another model
 * @throws BackendError when the backend asked for cannot start or there is not enough memory
 * @example
 * const runtime = await createRuntime(pack, { base: "model.safetensors" });
 * await runtime.switchTask("sst2");
 * const { data } = runtime.weight("bert.encoder.layer.0.attention.self.query");
 */
export async function createRuntime(pack: Pack, options: RuntimeOptions = {}): Promise<Runtime> {
  checkPack("createRuntime", pack);
  checkOptions("createRuntime", options, [
    ...(["base", "mode", "policy", "names", "anyBase", "ignore", "modules", "signal"] as const),
    ...(["backend", "webgpu", "wasm"] as const),
    ...FETCH_OPTIONS,
  ]);
  const { base, mode = base ? "folded" : "core", policy = "copy" } = options;
  checkChoice("mode", mode, ["core", "factors", "folded"]);
  checkChoice("policy", policy, ["copy", "reload"]);
  if (mode === "folded" && base === undefined) throw new TypeError('mode "folded" needs a base');
  const { modules } = options;
  const view = modules === undefined ? pack : (await import("./part.ts")).partOf(pack, modules);
  const host = base === undefined ? undefined : await (await import("./open-base.ts")).openHost(base, options);
  // A host that the caller made is the caller's to close.
  const closeHost = host === base ? undefined : async () => host?.close?.();
  try {
    const folded = mode === "folded";
    const resolver = new WeightResolver(host, options.names);
    const placed = [...resolver.parameters.keys()].find((name) => onDevice(host?.view?.(name)?.data));
    if (policy === "reload" && (host?.begin || placed !== undefined)) {
      throw new TypeError('policy "reload" needs a base that is read from a file; this host is written in place');
    }
    const gpu = options.webgpu || {};
    const device = placed !== undefined || gpu.recreate ? await import("./device-host.ts") : undefined;
    device?.refuseHost(gpu, host, placed);
    const bindings = host ? await bindWeights(view.modules, resolver) : [];
    const keep = { pristine: folded && policy === "copy", active: folded && !host?.begin };
    const stays = folded && (!host?.begin || placed !== undefined);
    const onCpu = stays ? undefined : `${folded ? "weights" : "terms"} are wanted on the CPU`;

    const start = async (how: BackendOptions, signal?: AbortSignal): Promise<Started> => {
      const bases = await view.bases({ signal });
      let backend: Backend | undefined;
      try {
        const made = await createBackend(device && placed !== undefined ? device.onWebgpu(how) : how, onCpu);
        backend = made.backend;
        const readable = placed === undefined ? host : device!.deviceHost(base!, host!, backend);
        const kernels = new KernelSession(backend, view.modules, bases.bytes);
        if (host) await loadWeights(bindings, host, kernels, bases.bytes, keep, { signal, anyBase: options.anyBase });
        // A device that has no memory left says so only now.
        await backend.finish();
        return { kernels, passedOver: made.passedOver, host: readable };
      } catch (error) {
        backend?.close();
        throw error;
      } finally {
        bases.close();
      }
    };

    const terms = folded ? undefined : new (await import("./terms.ts")).ActiveTerms(mode, view.modules, bindings);
    const restart = gpu.recreate ? device!.restarting(start, options) : undefined;
    const ignored = new Set(options.ignore);
    const parts = { pack, view, mode, policy, bindings, resolver, ignored, terms, closeHost, restart };
    return new Runtime(parts, await start(options, options.signal));
  } catch (error) {
    await closeHost?.();
    throw error;
  }
}
