/**
 * The runtime: one pack on one base model, and which task is active. `startRuntime` finds the adapted weights in the
 * base and picks the backend that they go to. The runtime owns what is resident, orders switches and makes
 * each of them happen as a whole or not at all. The arithmetic is the backend's, the bytes are the pack's, the weights
 * are the host's.
 */
/// <reference lib="esnext.disposable" preserve="true" />
import type { DeviceBackend, DeviceHandle } from "../backends/backend.ts";
import { BackendError, checkChoice, checkOptions, nearest } from "../errors.ts";
import { Changes, now, pacer, throwIfAborted } from "../pace.ts";
import type { FetchOptions } from "../source.ts";
import { type BaseInput, type CpuView, onDevice, type View, type WeightHost } from "./base.ts";
import { type BackendOptions, createBackend, KernelSession, planTasks } from "./kernel-session.ts";
import type { Bases, Pack } from "./pack.ts";
import type { Parameters } from "./parameters.ts";
import type { ModuleFilter } from "./part.ts";
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
import { FoldedWeights, type Resolved, type RuntimeContext, type TaskChange, type WeightBinding } from "./weights.ts";

const NOTHING: Resolved = { parameters: new Map(), weights: new Map(), tables: new Set(), added: [], replaced: [] };

/** A pack at work. Made by `createRuntime`. */
export class Runtime extends Switching<RuntimeSwitchReport> {
  readonly pack: Pack;
  readonly mode: "folded" | "factors" | "core";
  /** Why backends before the one that runs were not used. */
  readonly passedOver: readonly string[];

  readonly #parts: RuntimeParts;
  readonly #bindingsByName = new Map<string, WeightBinding>();
  /** Made when a task first overrides some. */
  #parameters: Parameters | undefined;
  readonly #weights: FoldedWeights;
  /** Active selection with its tasks: the pack may have others under their ids by now, or be out of reach. */
  #now: LoadedTasks = { selection: null, head: undefined, tasks: [] };
  readonly #queue = new Changes();
  #closed = false;

  /** @internal Use `createRuntime`. */
  constructor(pack: Pack, parts: RuntimeParts) {
    super();
    const { mode, passedOver, bindings, kernels } = parts;
    this.pack = pack;
    this.mode = mode;
    this.passedOver = passedOver;
    this.#parts = parts;
    this.#weights = new FoldedWeights(parts, (name) => this.#parameters?.pristine(name));
    for (const binding of bindings)
      for (const { name } of [binding.weight, binding.module]) this.#bindingsByName.set(moduleName(name), binding);
    const { lost } = kernels.backend;
    if (!lost) return;
    // A device may live on after many runtimes, and would keep them.
    const runtime = new WeakRef(this);
    void lost.then(({ message }) => {
      const still = runtime.deref();
      if (still && !still.#closed) still.tell("devicelost", { message });
    });
  }

  /** Which backend runs, for instance "wasm (simd)". */
  get backend(): string {
    const { name, variant } = this.#parts.kernels.backend;
    return name === "js" ? "js" : `${name} (${variant})`;
  }

  /** The WebGPU device that it runs on. */
  get device(): DeviceHandle | undefined {
    return this.#parts.kernels.backend.device;
  }

  /** The active task. */
  get task(): Selection {
    return this.#now.selection;
  }

  /**
   * Makes a task, a blend or the pristine base active. Calls are queued. Long work lets the event loop have a turn now
   * and then: wait for the switch before the weights are used. When it fails or is aborted, the previous task stays
   * whole, or is made whole again; where a host does not let that be, nothing is read until another switch has
   * succeeded.
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
    return this.activate({ selection: copySelection(selection), head: options.head }, options.signal);
  }

  /** @internal */
  activate(selected: Selected, signal: AbortSignal | undefined): Promise<RuntimeSwitchReport> {
    return this.#queue.change(() => this.switching(selected.selection, () => this.#switch(selected, signal)));
  }

  /** @internal @throws BackendError while the weights are no task's */
  check(): void {
    this.#live();
    this.#weights.check();
  }

  async #switch(selected: Selected, signal: AbortSignal | undefined): Promise<RuntimeSwitchReport> {
    const started = now();
    const { selection, head } = selected;
    const { kernels, terms } = this.#parts;
    const { reads } = this.pack;
    this.#live();
    throwIfAborted(signal);
    const { bytes, requests } = reads;
    const change = await this.#load(selected, signal);
    const read = now();
    throwIfAborted(signal);
    kernels.allocated = 0;
    kernels.dispatches = 0;
    const former = this.#now;
    const activate = await (terms ?? this.#weights).write(change, () => this.#load(former), signal);
    const { resolved, weights } = change;
    const allocated = kernels.allocated + (this.#parameters?.allocated ?? 0);
    // No pause from here on: a reader in between would see one task's weights and another one's head.
    activate();
    this.#parameters?.activate(resolved);
    this.#now = { selection, head, tasks: change.tasks };
    const done = now();
    return {
      task: selection,
      bytesRead: reads.bytes - bytes,
      requests: reads.requests - requests,
      modules: weights.size,
      dispatches: kernels.dispatches,
      allocated,
      added: resolved.added,
      replaced: resolved.replaced,
      milliseconds: { read: read - started, compute: done - read, total: done - started },
    };
  }

  /** Reads everything that a switch needs, before anything is changed. */
  async #load({ selection, head, tasks: known }: Selected, signal?: AbortSignal): Promise<TaskChange> {
    const { view, ignored, host, kernels, terms } = this.#parts;
    const pause = pacer(signal);
    const tasks = known ?? (await loadParts(view, selection, { head, signal }, ignored));
    if (!host) terms?.checkUnbased(tasks);
    let resolved = NOTHING;
    if (tasks.some(({ blob }) => blob.parameters.length > 0)) {
      this.#parameters ??= new (await import("./parameters.ts")).Parameters(this.#parts);
      resolved = await this.#parameters.resolve(tasks, signal);
    }
    kernels.buffer.used = 0;
    const plans = planTasks(tasks, view.modules, kernels.buffer);
    const turn = pause();
    if (turn) await turn;
    return { tasks, plans, resolved, weights: await (terms ?? this.#weights).read(plans, resolved, signal) };
  }

  /** Parameters of the active task. */
  get #active(): ReadonlyMap<string, CpuView> {
    return this.#parameters?.active ?? NOTHING.parameters;
  }

  /**
   * A parameter of the model as the active task has it. Valid until the next switch; copy what has to last. A weight
   * that the runtime holds on a device is that device's buffer.
   * @param name of an adapted module ("encoder.layer.0.attention.self.query", with or without ".weight") or of a
   *   parameter that tasks override ("classifier.weight")
   * @throws RangeError when no task of the pack changes such a parameter, or the active one does not have it
   * @throws BackendError while a switch is under way, and where one failed and the task before it could not be put back
   */
  weight(name: string): View {
    this.#live();
    if (this.mode !== "folded") throw new TypeError(`weight: mode "${this.mode}" does not fold; use term("${name}")`);
    this.#weights.check();
    const parameter = this.#parameterName(name);
    const replaced = this.#active.get(parameter) ?? this.#active.get(name);
    if (replaced) return replaced;
    const { host, kernels } = this.#parts;
    const bindings = this.#bindingsByName;
    const { active, weight } = bindings.get(moduleName(name)) ?? bindings.get(moduleName(parameter)) ?? {};
    if (host!.begin) {
      const view = host!.view?.(weight?.name ?? parameter);
      if (view) return view;
      throw new TypeError("weight: the weights are in the host; read them there");
    }
    if (active && weight) {
      const data = active.block.device ?? kernels.backend.view!(active, weight.byteLength);
      return { dtype: weight.dtype, shape: weight.shape, data, byteOffset: active.byteOffset };
    }
    const pristine = this.#parameters?.pristine(parameter);
    if (pristine) return pristine;
    const names = nearest(name, [...bindings.keys(), ...this.#active.keys()]).join(", ");
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
      return (await import("./load-base.ts")).copyView(this.#parts.kernels.backend, view);
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
    const found = this.#parts.resolver?.find(name);
    return found && "name" in found ? found.name : name;
  }

  get #terms(): ActiveTerms {
    if (this.#parts.terms) return this.#parts.terms;
    throw new TypeError('mode "folded" has no terms; use weight()');
  }

  /**
   * y += x·ΔWᵀ, the low-rank term of a linear layer for a batch, of the active task or of one task per row. Arrays of
   * the CPU are ready when it resolves; buffers of the runtime's device when what is submitted to it before is done.
   * Biases and heads are not in it: `term(name).bias`, `changes()`.
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
      this.#live();
      await this.#terms.apply(this.#now.tasks, name, x, y, options.tasks);
    });
  }

  /**
   * Every parameter in which the model of the active task differs from the base, by the base's names: folded weights
   * (mode "folded", where the runtime holds them), heads, biases, token rows. Valid until the next switch.
   * @throws BackendError as `weight`
   */
  changes(): ReadonlyMap<string, View> {
    this.#live();
    const views = new Map<string, View>();
    const { bindings, host } = this.#parts;
    for (const index of this.mode === "folded" ? this.#weights.modules : []) {
      const { name } = bindings[index]!.weight;
      const view = host!.begin ? host!.view?.(name) : this.weight(name);
      if (view) views.set(name, view);
    }
    return new Map([...views, ...this.#active]);
  }

  /** Resident bytes by owner. Memory of the caller's own (a map of tensors, a host) is not counted. */
  memory(): MemoryReport {
    const { kernels, terms } = this.#parts;
    const bytes = kernels.backend.memory();
    const { basis, coefficients } = this.pack.residentBytes;
    bytes.basis += basis;
    bytes.coefficients += coefficients;
    bytes.pristine += this.#parameters?.pristineBytes ?? 0;
    bytes.active += (this.#parameters?.activeBytes ?? 0) + (terms?.byteLength ?? 0);
    bytes.scratch += kernels.buffer.values.byteLength;
    return memoryReport(bytes);
  }

  /** Waits for switches under way, then frees everything. Weights in the caller's own memory stay as they are. */
  close(): Promise<void> {
    return this.#queue.change(async () => {
      if (this.#closed) return;
      this.#closed = true;
      this.#parts.kernels.backend.close();
      await this.#parts.closeHost?.();
    });
  }

  #live(): void {
    if (this.#closed) throw new BackendError("this runtime is closed; make a new one", { backend: this.backend });
  }
}

/** A name with or without ".weight", without it. */
function moduleName(name: string): string {
  return name.replace(/\.weight$/, "");
}

/** A selection, with its tasks where they have been loaded. */
type Selected = Omit<LoadedTasks, "tasks"> & Partial<LoadedTasks>;

interface RuntimeParts extends RuntimeContext {
  readonly passedOver: readonly string[];
  /** Undefined in mode "folded". */
  readonly terms: ActiveTerms | undefined;
  readonly closeHost: (() => Promise<void>) | undefined;
}

/** Options of `createRuntime`. */
export interface RuntimeOptions extends BackendOptions, FetchOptions {
  /** The base model's weights. Needed for mode "folded"; in the others only for DoRA and for biases. */
  readonly base?: BaseInput;
  /**
   * `folded`: W0 + ΔW is written where the weights are. `factors`: A and B of the active task are handed out. `core`:
   * the product of the coefficients is handed out, for a model that has the components built in. Folded when there is a
   * base.
   */
  readonly mode?: "folded" | "factors" | "core";
  /**
   * `copy` keeps the pristine weights in memory. `reload` reads them again at each switch: half the resident memory,
   * for a base that is a file. Default: `copy`.
   */
  readonly policy?: "copy" | "reload";
  /** Names of weights in the base, by module name of the pack, where matching by suffix does not find them. */
  readonly names?: ReadonlyMap<string, string>;
  /** Accept a base whose fingerprint differs, for instance one that was trained further. */
  readonly anyBase?: boolean;
  /** Parameters of tasks that are left out, by the pack's names: "classifier.weight". */
  readonly ignore?: Iterable<string>;
  /**
   * Which modules of the pack and of its tasks' parameters are used, by the pack's names. The others are left out: for
   * a base that lacks them, or is one of several files. Default: all.
   */
  readonly modules?: ModuleFilter;
  readonly signal?: AbortSignal;
}

/**
 * Loads the bases, finds the adapted weights in the base model and checks that it is the right one.
 * @param open opens the base. Default: it is a host or a map of tensors, so that no code for files is loaded
 * @throws RangeError, TypeError, BaseMismatchError, BackendError as `createRuntime`
 */
export async function startRuntime(
  pack: Pack,
  options: RuntimeOptions,
  open?: (base: BaseInput) => Promise<WeightHost>,
): Promise<Runtime> {
  const { base, mode = base ? "folded" : "core", policy = "copy" } = options;
  checkChoice("mode", mode, ["core", "factors", "folded"]);
  checkChoice("policy", policy, ["copy", "reload"]);
  if (mode === "folded" && base === undefined) throw new TypeError('mode "folded" needs a base');
  const { modules, signal, anyBase } = options;
  const view = modules === undefined ? pack : (await import("./part.ts")).partOf(pack, modules);
  // A runtime without a base needs none of it.
  const loader = base === undefined ? undefined : await import("./load-base.ts");
  const given = base instanceof Map && !open ? loader!.memoryHost(base) : (base as WeightHost | undefined);
  const opened = open && base !== undefined ? await open(base) : given;
  // A host that the caller made is the caller's to close.
  const closeHost = opened === base ? undefined : async () => opened?.close?.();
  let made: Awaited<ReturnType<typeof createBackend>> | undefined;
  let bases: Bases | undefined;
  try {
    const folded = mode === "folded";
    const placed = [...(opened?.list() ?? [])].find(({ name }) => onDevice(opened!.view?.(name)?.data));
    const inPlace = placed !== undefined;
    // Weights on a device are folded there or not at all, and WebGPU's own error then says why.
    const choices = [options.backend].flat() as (DeviceBackend | undefined)[];
    const device = inPlace ? choices.find((choice) => choice?.device) : undefined;
    if (inPlace && !device)
      throw new TypeError(
        `the base's "${placed.name}" lies on a device: pass that device, backend: webgpu({ device })`,
      );
    if (policy === "reload" && (opened?.begin || inPlace)) {
      throw new TypeError('policy "reload" needs a base that is read from a file; this host is written in place');
    }
    const { resolver, bindings = [] } = (opened && loader?.bindWeights(opened, view.modules, options.names)) ?? {};
    bases = await view.bases({ signal });
    made = await createBackend(device ? { backend: device } : options);
    const { backend, passedOver } = made;
    const kernels = new KernelSession(backend, view.modules, bases.bytes);
    const host = inPlace && base instanceof Map ? loader!.memoryHost(base, backend) : opened;
    const keep = { pristine: folded && policy === "copy", active: folded && !host?.begin };
    if (host) await loader!.loadWeights(bindings, host, kernels, bases.bytes, keep, { signal, anyBase });
    // A device that has no memory left says so only now.
    await backend.finish();
    const context = { view, mode, kernels, host, resolver, bindings, ignored: new Set(options.ignore) };
    const terms = mode === "folded" ? undefined : new (await import("./terms.ts")).ActiveTerms(context, mode);
    return new Runtime(pack, { ...context, passedOver, terms, closeHost });
  } catch (error) {
    made?.backend.close();
    await closeHost?.();
    throw error;
  } finally {
    bases?.close();
  }
}
