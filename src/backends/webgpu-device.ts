/**
 * A WebGPU device: the user's, or one asked for; and what it says went wrong, which WebGPU tells later than it happens.
 * Knows nothing of blocks or kernels.
 */
/// <reference types="@webgpu/types" />
import { openGpu } from "#platform";
import { BackendError } from "../errors.ts";
import type { DeviceHandle } from "./backend.ts";

export interface OpenDevice {
  device: DeviceHandle;
  /** Of the adapter, for people. */
  description: string;
  /** Ends the device, if it was asked for here. */
  close(): void;
}

/**
 * @param given the user's device; one is requested when absent
 * @throws BackendError when there is no WebGPU, no adapter, or the adapter gives no device
 * @throws TypeError when `given` is none
 */
export async function openDevice(given?: DeviceHandle): Promise<OpenDevice> {
  if (given) {
    const { adapterInfo, createShaderModule } = given as GPUDevice;
    if (typeof createShaderModule !== "function") throw new TypeError("webgpu.device: expected a WebGPU device");
    return { device: given, description: describe(adapterInfo), close() {} };
  }
  try {
    let gpu: GPU | undefined = (await openGpu()) as GPU;
    const adapter = await gpu.requestAdapter({ powerPreference: "high-performance" });
    if (!adapter) throw new Error("there is no adapter; a driver may be missing, or the browser may have WebGPU disabled");
    // Above the defaults only what decides which weights fit: the size of a buffer, and how much of it a kernel sees.
    const { maxBufferSize, maxStorageBufferBindingSize } = adapter.limits;
    const device = await adapter.requestDevice({
      label: "eigenlora",
      requiredLimits: { maxBufferSize, maxStorageBufferBindingSize },
    });
    return {
      device,
      description: describe(adapter.info),
      close() {
        device.destroy();
        // Dawn in Node works for as long as its entry point is referenced, and keeps the process alive.
        gpu = undefined;
      },
    };
  } catch (cause) {
    throw new BackendError(`webgpu: ${(cause as Error).message}`, { backend: "webgpu", cause });
  }
}

function describe(info: GPUAdapterInfo | undefined): string {
  return info?.description || info?.architecture || info?.vendor || "unknown adapter";
}

/** Collects errors of a device. Error scopes are opened and closed within one call, so that a user's own stay in order. */
export class Faults {
  readonly #device: GPUDevice;
  readonly #open = new Set<Promise<void>>();
  #first: BackendError | undefined;
  #lost: BackendError | undefined;

  constructor(device: DeviceHandle) {
    this.#device = device as GPUDevice;
    void this.#device.lost.then(({ reason, message }) => {
      this.#lost = fault(`the device was lost (${reason || "unknown"}): ${message}. Make a new runtime`);
    });
  }

  /** Runs `call` and listens for what the device thinks of it. @throws BackendError when the device is lost */
  guard<T>(what: string, call: () => T): T {
    if (this.#lost) throw this.#lost;
    const kinds = ["validation", "out-of-memory", "internal"] as const;
    for (const kind of kinds) this.#device.pushErrorScope(kind);
    try {
      return call();
    } finally {
      for (const kind of kinds.toReversed()) this.#listen(`${what}, ${kind}`, this.#device.popErrorScope());
    }
  }

  #listen(what: string, scope: Promise<GPUError | null>): void {
    const heard = scope
      .then((error) => {
        if (error) this.#first ??= fault(`${what}: ${error.message}`, error);
      })
      // A lost device has no scopes; its loss is reported by itself.
      .catch(() => undefined)
      .finally(() => this.#open.delete(heard));
    this.#open.add(heard);
  }

  /** @throws BackendError, the first fault since the last call, or the loss of the device */
  async settle(): Promise<void> {
    await Promise.all(this.#open);
    if (this.#lost) throw this.#lost;
    const first = this.#first;
    this.#first = undefined;
    if (first) throw first;
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
