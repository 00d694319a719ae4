/** Extraction for fixed-width SIMD. Exports: see `extraction.ts`. */
export * from "./extraction";
