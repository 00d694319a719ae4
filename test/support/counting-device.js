/**
 * A device of Dawn's that counts its work. Tests, the soak and the benchmarks hand it to the backend, which knows
 * nothing of it.
 */
/// <reference types="@webgpu/types" />

/**
 * Dawn's entry point, for the life of the process: when it is collected, drivers may crash or wait for ever.
 * @type {GPU | undefined}
 */
let dawn;

/**
 * @typedef {object} Counts
 * @property {number} submits
 * @property {number} dispatches calls of dispatchWorkgroups
 * @property {number} written bytes that crossed the bus by writeBuffer, or in buffers mapped from the start
 * @property {number} live bytes of live buffers, by createBuffer and destroy
 */

/**
 * @param {(adapter: GPUAdapter) => GPUDeviceDescriptor} [describe] what to request of the adapter; the defaults if
 *   absent
 * @returns {Promise<{ device: GPUDevice, adapter: GPUAdapter, counts: Counts, close(): void }>} `close` destroys the
 *   device
 * @throws Error where Dawn does not start
 */
export async function countingDevice(describe) {
  // Dawn rounds timestamps to 65.5 µs otherwise.
  dawn ??= (await import("webgpu")).create(["disable-dawn-features=timestamp_quantization"]);
  const adapter = await dawn.requestAdapter({ powerPreference: "high-performance" });
  if (!adapter) throw new Error("Dawn finds no adapter; a driver may be missing");
  const device = await adapter.requestDevice(describe?.(adapter));
  return {
    device,
    adapter,
    counts: count(device),
    close: () => device.destroy(),
  };
}

/**
 * @param {GPUDevice} device
 * @returns {Counts}
 */
function count(device) {
  /** @type {Counts} */
  const counts = { submits: 0, dispatches: 0, written: 0, live: 0 };
  const { queue } = device;
  const { submit, writeBuffer } = queue;
  const { createBuffer, createCommandEncoder } = device;
  queue.submit = (commands) => {
    counts.submits++;
    return submit.call(queue, commands);
  };
  queue.writeBuffer = (buffer, at, source, start = 0, size) => {
    // Start and size are in elements of a typed array, in bytes of others.
    const element = "BYTES_PER_ELEMENT" in source ? Number(source.BYTES_PER_ELEMENT) : 1;
    counts.written += size === undefined ? source.byteLength - start * element : size * element;
    return writeBuffer.call(queue, buffer, at, source, start, size);
  };
  device.createBuffer = (descriptor) => {
    const buffer = createBuffer.call(device, descriptor);
    const { destroy } = buffer;
    let { size } = descriptor;
    counts.live += size;
    if (descriptor.mappedAtCreation) counts.written += size;
    buffer.destroy = () => {
      counts.live -= size;
      size = 0;
      return destroy.call(buffer);
    };
    return buffer;
  };
  device.createCommandEncoder = (descriptor) => {
    const encoder = createCommandEncoder.call(device, descriptor);
    const { beginComputePass } = encoder;
    encoder.beginComputePass = (options) => {
      const pass = beginComputePass.call(encoder, options);
      const { dispatchWorkgroups } = pass;
      pass.dispatchWorkgroups = (x, y, z) => {
        counts.dispatches++;
        return dispatchWorkgroups.call(pass, x, y, z);
      };
      return pass;
    };
    return encoder;
  };
  return counts;
}
