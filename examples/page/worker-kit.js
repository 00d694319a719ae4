/**
 * Code that the workers of both pages share: answering calls, reporting, fetching files, loading onnxruntime. Knows
 * nothing of tasks.
 *
 * The page sends { id, call, args }; the worker answers { id, value } or { id, error } and reports { event, detail }
 * meanwhile.
 */

/** @typedef {"wasm" | "webgpu"} Provider */
/** @typedef {typeof import("onnxruntime-web")} Ort */
/** @typedef {import("onnxruntime-common").InferenceSession.SessionOptions} SessionOptions */
/** @typedef {{ requests: number, bytes: number }} Reads */

/** @param {string} file */
export const addressOf = (file) => new URL(file, self.location.href).href;

/** @type {Promise<unknown>} */
let queue = Promise.resolve();

/**
 * @template T
 * @param {() => Promise<T>} work for which calls that come later wait
 * @returns {Promise<T>}
 */
export function inQueue(work) {
  const result = queue.then(work);
  queue = result.catch(() => {});
  return result;
}

/**
 * Answers the page's calls, one after the other.
 * @param {object} calls functions by name
 * @param {readonly string[]} atOnce names of those that do not wait for others, nor others for them
 */
export function answerCalls(calls, atOnce) {
  self.onmessage = ({ data: { id, call, args } }) => {
    const run = /** @type {Record<string, (...args: unknown[]) => Promise<unknown>>} */ (calls)[call];
    const answer = async () => {
      try {
        const value = await run(...args);
        self.postMessage({ id, value });
      } catch (error) {
        const { message, tag } = /** @type {Error & { tag?: string }} */ (error);
        self.postMessage({ id, error: { message, tag } });
      }
    };
    if (atOnce.includes(call)) void answer();
    else void inQueue(answer);
  };
}

/**
 * @param {string} event
 * @param {unknown} detail
 */
export function report(event, detail) {
  self.postMessage({ event, detail });
}

/**
 * @param {string} what
 * @param {number} [done]
 * @param {number} [total]
 */
export function progress(what, done, total) {
  report("progress", { what, done, total });
}

/** Lets messages in. */
export const turn = () => new Promise((resolve) => void setTimeout(resolve));

/** @param {string} file */
export async function getJson(file) {
  return (await get(file)).json();
}

/** @param {string} file */
export async function get(file) {
  const response = await fetch(addressOf(file)).catch((cause) => {
    throw new Error(`${file} cannot be fetched (${cause.message}): is the server still there?`, { cause });
  });
  if (!response.ok) throw new Error(`${file}: the server answered ${response.status}; build the page again`);
  return response;
}

/** Finds out if WebGPU can be used here, and otherwise the reason in plain words. */
export async function findWebGpu() {
  const gpu = /** @type {{ gpu?: { requestAdapter(): Promise<any> } }} */ (navigator).gpu;
  if (!gpu) return { reason: "this browser does not offer WebGPU here" };
  const adapter = await gpu.requestAdapter().catch(() => null);
  if (!adapter) return { reason: "this browser finds no graphics adapter for WebGPU" };
  const { vendor = "", architecture = "", isFallbackAdapter } = adapter.info ?? {};
  return { adapter: [vendor, architecture, isFallbackAdapter && "software"].filter(Boolean).join(" ") };
}

/**
 * The build that can do what is asked: the one with WebGPU is twice as large.
 * @param {Provider} provider
 * @returns {Promise<Ort>}
 */
export async function loadOrt(provider) {
  const webgpu = provider === "webgpu";
  const ort = webgpu ? await import("onnxruntime-web/webgpu") : await import("onnxruntime-web/wasm");
  // More threads need a cross-origin isolated page, which plain static hosts do not give.
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmPaths = { wasm: addressOf(`ort-wasm-simd-threaded${webgpu ? ".asyncify" : ""}.wasm`) };
  return ort;
}

/**
 * Distinguishes errors of one task from errors of the page.
 * @param {unknown} error
 */
export function isOfTask(error) {
  return ["task", "format", "base"].includes(/** @type {{ tag?: string }} */ (error).tag ?? "");
}
