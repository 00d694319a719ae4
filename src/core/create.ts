/**
 * Makes a runtime: opens the base, finds the adapted weights in it and picks the backend that they go to; and again, where the
 * device of the first is lost.
 */
import { checkChoice, checkOptions, checkPack } from "../arguments.ts";
import type { Backend } from "../backends/backend.ts";
import { type BackendOptions, createBackend } from "../backends/select.ts";
import { FETCH_OPTIONS, type FetchOptions } from "../source.ts";
import { type BaseInput, Locator, onDevice } from "./base.ts";
import { KernelSession, type Started } from "./kernel-session.ts";
import type { Pack } from "./pack.ts";
import type { ModuleFilter } from "./part.ts";
import { Runtime } from "./runtime.ts";
import { findSlots, loadSlots } from "./weights.ts";

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
    const locator = new Locator(host, options.names);
    const placed = [...locator.parameters.keys()].find((name) => onDevice(host?.view?.(name)?.data));
    if (policy === "reload" && (host?.begin || placed !== undefined)) {
      throw new TypeError('policy "reload" needs a base that is read from a file; this host is written in place');
    }
    const gpu = options.webgpu || {};
    const device = placed !== undefined || gpu.recreate ? await import("./device-host.ts") : undefined;
    device?.refuseHost(gpu, host, placed);
    const slots = host ? await findSlots(view.modules, locator) : [];
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
        if (host) await loadSlots(slots, host, kernels, bases.bytes, keep, { signal, anyBase: options.anyBase });
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

    const terms = folded ? undefined : new (await import("./terms.ts")).ActiveTerms(mode, view.modules, slots);
    const restart = gpu.recreate ? device!.restarting(start, options) : undefined;
    const ignored = new Set(options.ignore);
    const parts = { pack, view, mode, policy, slots, locator, ignored, terms, closeHost, restart };
    return new Runtime(parts, await start(options, options.signal));
  } catch (error) {
    await closeHost?.();
    throw error;
  }
}
