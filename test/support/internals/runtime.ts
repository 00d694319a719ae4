/** Reaches inside the built package for tests: every backend on the same numbers, and where a weight is. */

export type { Backend, Block, FoldJob, Slice } from "../../../dist/src/backends/backend.js";
export { createJsBackend } from "../../../dist/src/backends/js.js";
export { createWasmBackend, Heap, WASM_VARIANTS, type WasmVariant } from "../../../dist/src/backends/wasm.js";
export { createWebgpuBackend, Faults } from "../../../dist/src/backends/webgpu.js";
export { viewValues } from "../../../dist/src/core/base.js";
export { createBackend } from "../../../dist/src/core/kernel-session.js";
export { memoryHost } from "../../../dist/src/core/load-base.js";
export { NameMatcher, WeightResolver } from "../../../dist/src/core/mismatch.js";
export { openHost } from "../../../dist/src/core/open-base.js";
export { parseTaskFile } from "../../../dist/src/core/read-task-file.js";
export { Trust } from "../../../dist/src/core/trust.js";
