/**
 * Builds the kernels: dist/wasm/*.wasm for tools that need a file or a precompiled module, and beside each a module with the same bytes
 * as base64, which every bundler accepts without configuration for assets. Nothing is compiled at import time. Fails when the kernels
 * outgrow their budget.
 */
import { mkdirSync, writeFileSync } from "node:fs";
import { gzipSync } from "node:zlib";
import { compile } from "./compile.mjs";

/** Budget of the four run-time binaries together, gzipped: three of the kernels, and the decoder of coded sections (1.7 kB, since it works in pieces and says what is wrong). Those of extraction are never in a run-time bundle. */
const MAX_BYTES = 11_100;

const out = new URL("../dist/wasm/", import.meta.url);
mkdirSync(out, { recursive: true });

let total = 0;
for (const [name, variant] of /** @type {const} */ ([
  ["scalar", "scalar"],
  ["simd", "simd"],
  ["relaxed", "relaxed-simd"],
  ["coded", "simd"],
  ["extract-scalar", "scalar"],
  ["extract-simd", "simd"],
])) {
  const bytes = await compile(name, variant, name === "coded");
  const gzipped = gzipSync(bytes, { level: 9 }).byteLength;
  if (!name.startsWith("extract-")) total += gzipped;
  writeFileSync(new URL(`${name}.wasm`, out), bytes);
  const base64 = Buffer.from(bytes).toString("base64");
  const code = `import { fromBase64 } from "../src/text.js";\nexport default fromBase64("${base64}");\n`;
  writeFileSync(new URL(`${name}.js`, out), code);
  const type = "declare const bytes: Uint8Array<ArrayBuffer>;\nexport default bytes;\n";
  writeFileSync(new URL(`${name}.d.ts`, out), type);
  console.log(`wasm ${name}: ${bytes.byteLength} bytes, ${gzipped} gzipped`);
}
if (total > MAX_BYTES) {
  console.error(`The wasm binaries are ${total} bytes gzipped; the budget is ${MAX_BYTES}. Make the kernels smaller.`);
  process.exit(1);
}
console.log(`wasm at run time: ${total} bytes gzipped, budget ${MAX_BYTES}`);
