/** Opens the machine's GPU for measurements, and describes it. */
/// <reference types="@webgpu/types" />
import { createWebgpuBackend } from "../../dist/src/backends/webgpu.js";
import { countingDevice } from "../../test/support/counting-device.js";

/** @typedef {ReturnType<typeof createClock>} Clock */

const LOOK = `
@group(0) @binding(0) var<storage, read> watched: array<u32>;
@group(0) @binding(1) var<storage, read_write> seen: array<u32>;
@compute @workgroup_size(1) fn look() { seen[0] = watched[0]; }
`;

/** GPUBufferUsage, which is a global in browsers only. */
const [MAP_READ, COPY_SRC, COPY_DST, STORAGE, QUERY_RESOLVE] = [1, 4, 8, 128, 512];

/**
 * Timestamps around commands; undefined for devices without them.
 * @param {GPUDevice} device
 */
function createTimestamps(device) {
  if (!device.features.has("timestamp-query")) return undefined;
  const querySet = device.createQuerySet({ type: "timestamp", count: 2 });
  const resolved = device.createBuffer({ size: 16, usage: QUERY_RESOLVE | COPY_SRC });
  const readable = device.createBuffer({ size: 16, usage: MAP_READ | COPY_DST });
  const seen = device.createBuffer({ size: 4, usage: STORAGE });
  const pipeline = device.createComputePipeline({
    layout: "auto",
    compute: { module: device.createShaderModule({ code: LOOK }), entryPoint: "look" },
  });
  return {
    /** @param {GPUCommandEncoder} encoder @param {GPUBuffer} watched @param {0 | 1} index of the timestamp */
    mark(encoder, watched, index) {
      const entries = [watched, seen].map((buffer, binding) => ({ binding, resource: { buffer, size: 4 } }));
      const pass = encoder.beginComputePass({ timestampWrites: { querySet, endOfPassWriteIndex: index } });
      pass.setPipeline(pipeline);
      pass.setBindGroup(0, device.createBindGroup({ layout: pipeline.getBindGroupLayout(0), entries }));
      pass.dispatchWorkgroups(1);
      pass.end();
    },

    /** @param {GPUCommandEncoder} encoder */
    resolve(encoder) {
      encoder.resolveQuerySet(querySet, 0, 2, resolved, 0);
      encoder.copyBufferToBuffer(resolved, 0, readable, 0, 16);
    },

    /** Seconds between the two. */
    async read() {
      await readable.mapAsync(MAP_READ);
      const [from = 0n, to = 0n] = new BigUint64Array(readable.getMappedRange());
      readable.unmap();
      return Number(to - from) / 1e9;
    },
  };
}

/** @param {GPUDevice} device whose encoders and submits are watched from now on */
function createClock(device) {
  const { queue, createCommandEncoder } = device;
  const { submit } = queue;
  const timestamps = createTimestamps(device);
  /** @type {GPUBuffer | undefined} */
  let watched;
  let encoders = 0;
  /** Milliseconds of performance.now: begin of the first submit that is timed, end of the last one. */
  let [began, returned] = [NaN, NaN];

  device.createCommandEncoder = (descriptor) => {
    const encoder = createCommandEncoder.call(device, descriptor);
    const buffer = watched;
    if (!buffer) return encoder;
    const first = encoders++ === 0;
    if (!timestamps) return encoder;
    const { finish } = encoder;
    if (first) timestamps.mark(encoder, buffer, 0);
    encoder.finish = (options) => {
      // The mark of the last encoder stays where there are several.
      timestamps.mark(encoder, buffer, 1);
      timestamps.resolve(encoder);
      return finish.call(encoder, options);
    };
    return encoder;
  };
  queue.submit = (commands) => {
    if (Number.isNaN(began)) began = performance.now();
    submit.call(queue, commands);
    returned = performance.now();
  };

  return {
    how: timestamps ? "timestamps of the device" : "wall clock, submit to done",

    /** Milliseconds of performance.now at the end of the last submit. */
    submitted: () => returned,

    /**
     * Seconds from the first command that is encoded to the last.
     * @param {GPUBuffer} buffer a storage buffer that its last command writes
     * @param {() => Promise<unknown>} run encodes, submits and waits until the device is done
     */
    async time(buffer, run) {
      [watched, encoders, began] = [buffer, 0, NaN];
      device.pushErrorScope("validation");
      try {
        await run();
      } finally {
        watched = undefined;
      }
      const done = performance.now();
      const error = await device.popErrorScope();
      if (error) throw new Error(`the clock: ${error.message}`);
      if (encoders === 0) throw new Error("the clock: nothing was encoded");
      return timestamps ? timestamps.read() : (done - began) / 1000;
    },
  };
}

/** @typedef {Awaited<ReturnType<typeof openDevice>>} Device */

export const SOFTWARE = "A software adapter: its times say nothing about a GPU.";

export async function openDevice() {
  const counted = await countingDevice(({ features, limits: { maxBufferSize, maxStorageBufferBindingSize } }) => ({
    requiredFeatures: /** @type {GPUFeatureName[]} */ (["timestamp-query"]).filter((name) => features.has(name)),
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
    subgroups: has("subgroups"),
    maxBufferSize: limits.maxBufferSize,
    maxStorageBufferBindingSize: limits.maxStorageBufferBindingSize,
    minStorageBufferOffsetAlignment: limits.minStorageBufferOffsetAlignment,
    maxStorageBuffersPerShaderStage: limits.maxStorageBuffersPerShaderStage,
    maxComputeInvocationsPerWorkgroup: limits.maxComputeInvocationsPerWorkgroup,
    maxComputeWorkgroupStorageSize: limits.maxComputeWorkgroupStorageSize,
  };
}
