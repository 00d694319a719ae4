/** Opens the machine's GPU for measurements, and describes it. */
/// <reference types="@webgpu/types" />
import { createWebgpuBackend } from "../../dist/src/backends/webgpu.js";
import { countingDevice } from "../../test/counting-device.js";
import { createClock } from "./gpu-clock.js";

/** @typedef {Awaited<ReturnType<typeof openDevice>>} Device */

export const SOFTWARE = "A software adapter: its times say nothing about a GPU.";

/** @param {boolean} halves whether to ask for the feature shader-f16, which changes what kernels may use */
export async function openDevice(halves) {
  const counted = await countingDevice(({ features, limits: { maxBufferSize, maxStorageBufferBindingSize } }) => ({
    requiredFeatures: /** @type {GPUFeatureName[]} */ (["timestamp-query", ...(halves ? ["shader-f16"] : [])]).filter(
      (name) => features.has(name),
    ),
    // The backend asks for the same limits on a device of its own.
    requiredLimits: { maxBufferSize, maxStorageBufferBindingSize },
  }));
  const { device, adapter } = counted;
  const backend = await createWebgpuBackend({ device });
  return {
    ...counted,
    clock: createClock(device),
    backend,
    software: adapter.info.isFallbackAdapter,
    close() {
      backend.close();
      counted.close();
    },
  };
}

/**
 * Result where no device opens; the benchmark then fails.
 * @param {string} question
 * @param {unknown} error
 * @returns {import("./report.js").Result}
 */
export function noDevice(question, error) {
  process.exitCode = 1;
  return [[{ question, rows: [] }], [{ name: "webgpu", reason: /** @type {Error} */ (error).message }]];
}

/** @param {Device} device @returns {import("./report.js").Row} */
export function describe({ adapter: { info, features, limits }, clock, software }) {
  const has = (/** @type {string} */ name) => (features.has(name) ? "yes" : "no");
  return {
    gpu: info.description || "unnamed",
    vendor: info.vendor || "unnamed",
    architecture: info.architecture || "unnamed",
    software: software ? "yes" : "no",
    clock: clock.how,
    "timestamp-query": has("timestamp-query"),
    "shader-f16": has("shader-f16"),
    subgroups: has("subgroups"),
    maxBufferSize: limits.maxBufferSize,
    maxStorageBufferBindingSize: limits.maxStorageBufferBindingSize,
    minStorageBufferOffsetAlignment: limits.minStorageBufferOffsetAlignment,
    maxStorageBuffersPerShaderStage: limits.maxStorageBuffersPerShaderStage,
    maxComputeInvocationsPerWorkgroup: limits.maxComputeInvocationsPerWorkgroup,
    maxComputeWorkgroupStorageSize: limits.maxComputeWorkgroupStorageSize,
  };
}
