/** Reaches inside the built package for tests: numbers, names and small things that tests make material with. */

export { nearest } from "../../../dist/src/errors.js";
export { openHub } from "../../../dist/src/http/hub.js";
export type { HubName } from "../../../dist/src/http/hub-name.js";
export { hubName } from "../../../dist/src/http/hub-page.js";
export { openSource } from "../../../dist/src/open-source.js";
export { atOnce } from "../../../dist/src/pace.js";
export * as dtypes from "../../../dist/src/tensor/dtypes.js";
export * from "../../../dist/src/tensor/dtypes.js";
export { encodeTensor } from "../../../dist/src/tensor/encode.js";
export { openGguf } from "../../../dist/src/tensor/gguf.js";
export { normal, shuffle, uniform } from "../../../dist/src/tensor/random.js";
export { openSafetensors, type SafetensorsEntry, writeSafetensors } from "../../../dist/src/tensor/safetensors.js";
export { transpose } from "../../../dist/src/tensor/term.js";
export { fromBase64, fromUtf8, toBase64, toHex, toUtf8 } from "../../../dist/src/text.js";
