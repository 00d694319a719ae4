/**
 * Exports of the builds for extraction, which are in no run-time bundle. `ExtractionKernels` in
 * `src/extract/wasm-products.ts` is the twin.
 */
export { products } from "./products";
export { bestScale } from "./scale";
export { tridiagonalize, turnBack } from "./tridiagonal";
export { variant } from "./lanes";
