/** The export list of every build. `WasmKernels` in `src/backends/wasm.ts` is its TypeScript twin. */
export { expand, fold, project, scaleColumns, scaleRows } from "./kernels";
export { products } from "./products";

/** Which build this is: 0 scalar, 1 simd, 2 relaxed-simd. */
export const variant: i32 = ASC_FEATURE_RELAXED_SIMD ? 2 : ASC_FEATURE_SIMD ? 1 : 0;
