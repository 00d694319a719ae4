/**
 * A WebGPU device: the user's, or one asked for; and what it says went wrong, which WebGPU tells later than it happens.
 * Knows nothing of blocks or kernels.
 */
/// <reference types="@webgpu/types" />
import { openGpu } from "#gpu";
import { BackendError } from "../errors.ts";
import type { DeviceHandle } from "./backend.ts";

const ADVICE = "Make a new runtime, or let it come back by itself with webgpu: { recreate: true }";

export interface DeviceOptions {
  /** The device to compute on, which stays the caller's. Absent: one is requested, and destroyed by `close`. */
  readonly device?: DeviceHandle | undefined;
  /** Refuse an adapter that computes on the CPU. */
  readonly hardware?: boolean | undefined;
  /** Milliseconds to wait for the device, each time. Default: 60 000. */
  readonly timeout?: number | undefined;
}

export interface OpenDevice {
  readonly device: DeviceHandle;
  /** Names the adapter, for people. */
  readonly description: string;
  /** Ends the device, if it was asked for here. */
  close(): void;
}

/** A device that has not answered by then is taken for lost. Software adapters need seconds for large weights. */
const TIMEOUT = 60_000;

/**
 * @throws BackendError when there is no WebGPU, no adapter, the adapter gives no device, or does not answer
 * @throws TypeError when the given device is none
 */
export async function openDevice({ device: given, hardware, timeout = TIMEOUT }: DeviceOptions): Promise<OpenDevice> {
  if (given) {
    const { adapterInfo, createShaderModule } = given as GPUDevice;
    if (typeof createShaderModule !== "function") throw new TypeError("webgpu.device: expected a WebGPU device");
    return { device: given, description: describe(adapterInfo), close() {} };
  }
  try {
    const gpu = (await openGpu()) as GPU;
    const asked = gpu.requestAdapter({ powerPreference: "high-performance" });
    const adapter = await inTime(asked, timeout, "the adapter");
    if (!adapter)
      throw new Error("there is no adapter; a driver may be missing, or the browser may have WebGPU disabled");
    if (hardware && adapter.info.isFallbackAdapter) {
      throw new Error(`the adapter is software (${describe(adapter.info)}); ask for it with backend: "webgpu"`);
    }
    // Limits are raised only where they decide which weights fit: the size of a buffer, and how much of it a kernel sees. With
    // halves as elements kernels need not write words that two of them share.
    const { maxBufferSize, maxStorageBufferBindingSize } = adapter.limits;
    const requested = adapter.requestDevice({
      label: "eigenlora",
      requiredFeatures: adapter.features.has("shader-f16") ? ["shader-f16"] : [],
      requiredLimits: { maxBufferSize, maxStorageBufferBindingSize },
    });
    const device = await inTime(requested, timeout, "the device");
    return {
      device,
      description: describe(adapter.info),
      close: () => device.destroy(),
    };
  } catch (cause) {
    throw new BackendError(`webgpu: ${(cause as Error).message}`, { backend: "webgpu", cause });
  }
}

function describe(info: GPUAdapterInfo | undefined): string {
  return info?.description || info?.architecture || info?.vendor || "unknown adapter";
}

/** @throws Error when `work` takes longer than `timeout` milliseconds */
async function inTime<T>(work: Promise<T>, timeout: number, what: string): Promise<T> {
  let timer: ReturnType<typeof setTimeout> | undefined;
  const late = new Promise<never>((_, reject) => {
    timer = setTimeout(() => reject(new Error(`${what} did not answer within ${timeout} ms`)), timeout);
  });
  try {
    return await Promise.race([work, late]);
  } finally {
    clearTimeout(timer);
  }
}

/** Collects errors of a device. Error scopes are opened and closed within one call, so that a user's own stay in order. */
export class Faults {
  /** Resolves when the device is lost, or has not answered in time. */
  readonly lost: Promise<BackendError>;
  readonly #device: GPUDevice;
  readonly #timeout: number;
  readonly #open = new Set<Promise<void>>();
  /** Ends waits when the device is lost. A race with `lost` would be kept as long as the device. */
  readonly #waiting = new Set<() => void>();
  #first: BackendError | undefined;
  #loss: BackendError | undefined;
  #lose!: (loss: BackendError) => void;

  constructor(device: DeviceHandle, timeout: number = TIMEOUT) {
    this.#device = device as GPUDevice;
    this.#timeout = timeout;
    this.lost = new Promise((resolve) => {
      this.#lose = (loss) => {
        resolve((this.#loss ??= loss));
        for (const end of this.#waiting) end();
      };
    });
    void this.#device.lost.then(({ reason, message }) => {
      this.#lose(fault(`the device was lost (${reason || "unknown"}): ${message.replace(/\.+$/, "")}. ${ADVICE}`));
    });
  }

  /**
   * Runs `call` and listens for what the device thinks of it.
   * @param refused called when it was refused
   * @throws BackendError when the device is lost
   */
  guard<T>(what: string, call: () => T, refused?: () => void): T {
    if (this.#loss) throw this.#loss;
    const kinds = ["validation", "out-of-memory", "internal"] as const;
    for (const kind of kinds) this.#device.pushErrorScope(kind);
    try {
      return call();
    } finally {
      for (const kind of kinds.toReversed()) this.#listen(`${what}, ${kind}`, this.#device.popErrorScope(), refused);
    }
  }

  #listen(what: string, scope: Promise<GPUError | null>, refused: (() => void) | undefined): void {
    const heard = scope
      .then((error) => {
        if (!error) return;
        this.#first ??= fault(`${what}: ${error.message}`, error);
        refused?.();
      })
      // A lost device has no scopes; its loss is reported by itself.
      .catch(() => undefined)
      .finally(() => this.#open.delete(heard));
    this.#open.add(heard);
  }

  /**
   * Waits for what the device was asked for. A device that is not done in time counts as lost from then on.
   * @throws BackendError, the first fault since the last call, or the loss of the device
   */
  async wait(work: Promise<unknown>): Promise<void> {
    let refused: BackendError | undefined;
    const heard = work
      .catch((cause: Error) => void (refused = fault(cause.message, cause)))
      .then(() => Promise.all(this.#open));
    let end!: () => void;
    const lost = new Promise<void>((resolve) => (end = resolve));
    this.#waiting.add(end);
    if (this.#loss) end();
    try {
      await inTime(Promise.race([heard, lost]), this.#timeout, "the device");
    } catch (cause) {
      this.#lose(fault(`${(cause as Error).message}. ${ADVICE}`, cause));
    } finally {
      this.#waiting.delete(end);
    }
    // The fault behind a refusal is the better message.
    const found = this.#loss ?? this.#first ?? refused;
    this.#first = undefined;
    if (found) throw found;
  }
}

function fault(message: string, cause?: unknown): BackendError {
  return new BackendError(`webgpu: ${message}`, { backend: "webgpu", cause });
}

/**
 * Compiles a shader.
 * @throws BackendError with label, line, column and the line itself
 */
export async function compile(device: DeviceHandle, label: string, code: string): Promise<GPUShaderModule> {
  const gpu = device as GPUDevice;
  gpu.pushErrorScope("validation");
  const module = gpu.createShaderModule({ label, code });
  const scope = gpu.popErrorScope();
  const { messages } = await module.getCompilationInfo();
  const reasons = messages
    .filter((m) => m.type === "error")
    .map((m) => `${label}:${m.lineNum}:${m.linePos}: ${m.message}\n  ${code.split("\n")[m.lineNum - 1] ?? ""}`);
  const refused = await scope;
  if (refused && reasons.length === 0) reasons.push(`${label}: ${refused.message}`);
  if (reasons.length > 0) throw new BackendError(`webgpu: ${reasons.join("\n")}`, { backend: "webgpu", reasons });
  return module;
}
