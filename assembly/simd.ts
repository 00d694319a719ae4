/** The build for fixed-width SIMD (every engine since 2021). Exports: see `exports.ts`. */
export * from "./exports";
