/** The build for relaxed SIMD, which fuses multiply and add where the machine can. Exports: see `exports.ts`. */
export * from "./exports";
