/**
 * Bases on a device: maps with tensors there, as hosts in the CPU's memory, since heads, biases and token rows are computed there; and values
 * that are fetched from it. Loaded where a device is at work.
 */
import type { Backend, Block, DeviceBuffer, DeviceHandle, Slice } from "../backends/backend.ts";
import type { BackendOptions } from "../backends/select.ts";
import {
  type BaseInput,
  byteLengthOf,
  type CpuView,
  onDevice,
  type Transaction,
  type View,
  type WeightHost,
} from "./base.ts";

/** The place of a view, as the backend sees it. */
function sliceOf(backend: Backend, view: View): Slice {
  return { block: backend.adopt!(view.data as DeviceBuffer), byteOffset: view.byteOffset };
}

/** Parameters that a host has on the device. */
interface Originals {
  /** The parameter as it was before the first write, where it lies on the device. */
  original(name: string): View | undefined;
  /** Buffers made for values that do not fit the original, for instance a head with other labels. */
  readonly made: Map<string, Block>;
}

/**
 * @param base what the host was made of. Only a map leaves it to the runtime to read and write parameters on the device
 * @param host has `view`
 * @throws TypeError when the backend computes elsewhere
 */
export function deviceHost(base: BaseInput, host: WeightHost, backend: Backend): WeightHost {
  if (!backend.adopt)
    throw new TypeError(`the base lies on a device; backend "${backend.name}" cannot fold there, "webgpu" can`);
  if (!(base instanceof Map)) return host;
  const known = new Map<string, View>();
  const original = (name: string): View | undefined => {
    if (known.has(name)) return known.get(name);
    if (![...host.list()].some((parameter) => parameter.name === name)) return undefined;
    const view = host.view!(name);
    if (!view || !onDevice(view.data)) return undefined;
    known.set(name, view);
    return view;
  };
  const originals: Originals = { original, made: new Map() };
  return {
    list: () => host.list(),
    async read(name, into, options) {
      const view = original(name);
      if (!view) return host.read(name, into, options);
      return copyView(backend, view);
    },
    view: (name) => host.view!(name),
    ...(host.begin && {
      begin: (names: Iterable<string>, alone?: Iterable<string>) =>
        transaction(host.begin!(names, alone), backend, originals),
    }),
    ...(host.close && { close: () => host.close!() }),
  };
}

/** Values go to where the original lies, or to buffers of their own where they do not fit. */
function transaction(inner: Transaction, backend: Backend, { original, made }: Originals): Transaction {
  /** New buffers by name; undefined where the original takes the value. */
  const fresh = new Map<string, Block | undefined>();
  return {
    async write(name, view) {
      const place = original(name);
      if (!place || !view) return inner.write(name, view);
      const bytes = view.data as Uint8Array;
      const fits = byteLengthOf(place) === bytes.length;
      const block = fits ? undefined : backend.allocate(bytes.length, "active");
      fresh.set(name, block);
      backend.upload(block ? { block, byteOffset: 0 } : sliceOf(backend, place), bytes);
      if (block) await inner.write(name, { ...view, data: block.device!, byteOffset: 0 });
      else if (made.has(name)) await inner.write(name, place);
    },
    async commit() {
      await inner.commit();
      for (const [name, block] of fresh) {
        const old = made.get(name);
        if (old) backend.free(old);
        if (block) made.set(name, block);
        else made.delete(name);
      }
    },
    async rollback() {
      await inner.rollback();
      for (const block of fresh.values()) if (block) backend.free(block);
    },
  };
}

/** Asks for WebGPU by name: weights on a device are folded there or not at all, and its own error then says why. */
export function onWebgpu(how: BackendOptions): BackendOptions {
  return how.backend === undefined || how.backend === "auto" ? { ...how, backend: "webgpu" } : how;
}

/** A copy in the CPU's memory. */
export async function copyView(backend: Backend, view: View): Promise<CpuView> {
  const { data, byteOffset } = view;
  if (!onDevice(data)) return { ...view, data: data.slice(byteOffset, byteOffset + byteLengthOf(view)), byteOffset: 0 };
  return { ...view, data: await backend.read!(sliceOf(backend, view), byteLengthOf(view)), byteOffset: 0 };
}

/**
 * @param placed name of a parameter that lies on a device
 * @throws TypeError where the host cannot be what the options ask of it
 */
export function refuseHost(
  { device, recreate }: { device?: DeviceHandle | undefined; recreate?: unknown },
  host: WeightHost | undefined,
  placed: string | undefined,
): void {
  if (placed !== undefined && !device) {
    throw new TypeError(`the base's "${placed}" lies on a device: pass that device, webgpu: { device }`);
  }
  if (placed !== undefined && recreate === true) {
    throw new TypeError("webgpu.recreate: weights on a device are lost with it; pass a function that makes both again");
  }
  if (recreate && placed === undefined && host?.begin) {
    throw new TypeError(
      "webgpu.recreate needs a base that can be read again; this host holds the active task's weights",
    );
  }
}

/** Starts again where the device was lost: on another one of the system's, or on the one that the caller makes. */
export function restarting<Started>(
  start: (how: BackendOptions) => Promise<Started>,
  options: BackendOptions,
): () => Promise<Started> {
  const { device: _lost, recreate, ...gpu } = options.webgpu || {};
  return async () => {
    const device = typeof recreate === "function" ? { device: await recreate() } : {};
    return start({ ...options, backend: "webgpu", webgpu: { ...gpu, ...device } });
  };
}
