/** The export list of the builds for extraction, which no run-time bundle holds. `ExtractionKernels` in `src/extract/wasm-products.ts` is its twin. */
export { products } from "./products";
export { bestScale } from "./scale";
export { tridiagonalize, turnBack } from "./tridiagonal";
export { variant } from "./variant";
