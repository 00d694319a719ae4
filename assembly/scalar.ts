/** The build for engines without SIMD. Exports: see `exports.ts`. */
export * from "./exports";
