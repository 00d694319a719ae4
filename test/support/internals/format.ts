/**
 * Reaches inside the built package for tests: bytes of SPEC.md, written wrongly on purpose or against its own words.
 */

export * from "../../../dist/src/format/coded.js";
export { wasmFloats, wasmWork } from "../../../dist/src/format/coded-wasm.js";
export { parseTask } from "../../../dist/src/format/directory.js";
export * from "../../../dist/src/format/encode.js";
export { Encoder, encodeSection } from "../../../dist/src/format/encode-coded.js";
export { crc32c, integrityOf, sha256 } from "../../../dist/src/format/fields.js";
export { encodedTensor, readTensor, sharedBases } from "../../../dist/src/format/format.js";

/** The decoder as a module of its own that has compiled nothing yet: what engines refuse to compile is tried on it. */
export const freshDecoder = async (): Promise<typeof import("../../../dist/src/format/coded-wasm.js")> =>
  import(`../../../dist/src/format/coded-wasm.js?${Math.random()}`);
