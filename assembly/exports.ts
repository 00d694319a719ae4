/** Exports of every run-time build. `WasmKernels` in `src/backends/wasm.ts` is the TypeScript twin. */
export { expand, fold, project, scaleColumns, scaleRows } from "./kernels";
export { variant } from "./lanes";
