/** Extraction for engines without SIMD. Exports: see `extraction.ts`. */
export * from "./extraction";
