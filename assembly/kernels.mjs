/**
 * The WebAssembly binaries of dist/wasm: a file of each for tools that want a file or a precompiled module, and beside
 * it a module with the same bytes as base64, which every bundler takes without being told about assets.
 */
import { fileURLToPath } from "node:url";
import { setFlagsFromString } from "node:v8";
import { gzipSync } from "node:zlib";

/**
 * Budget of the four run-time binaries together, gzipped: three of the kernels, and the decoder of coded sections (3.1
 * kB, since it decodes two rows at a time, works in pieces, says what is wrong, and makes floats of integers). Those of
 * extraction are never in a run-time bundle.
 */
const MAX_BYTES = 12_300;

const TYPE = "declare const bytes: Uint8Array<ArrayBuffer>;\nexport default bytes;\n";

/** Compiler switches of each build. */
const FEATURES = {
  scalar: [],
  simd: ["--enable", "simd"],
  "relaxed-simd": ["--enable", "simd", "--enable", "relaxed-simd"],
};

/**
 * Compiles one entry of this folder. Memory is imported, so that the caller decides when it grows; there is no garbage
 * collector and no static data.
 * @param {string} entry name of the file without ".ts"
 * @param {keyof typeof FEATURES} variant
 * @param {boolean} small fewer bytes before a few per cent of speed
 * @returns {Promise<Uint8Array<ArrayBuffer>>} the module's bytes
 * @throws {Error} with the compiler's own output
 */
async function compile(entry, variant, small) {
  // Loaded here, since most builds compile no kernel.
  const { default: asc } = await import("assemblyscript/asc");
  /** @type {Uint8Array | undefined} */
  let wasm;
  const { error, stderr } = await asc.main(
    [
      `${entry}.ts`,
      ...["--baseDir", fileURLToPath(new URL(".", import.meta.url)), "--outFile", "out.wasm"],
      ...["-O3", "--shrinkLevel", small ? "1" : "0", "--converge", "--noAssert"],
      ...["--runtime", "stub", "--importMemory", "--noExportMemory"],
      ...FEATURES[variant],
    ],
    {
      writeFile(name, contents) {
        if (name === "out.wasm" && typeof contents !== "string") wasm = contents;
      },
    },
  );
  if (error || !wasm) throw new Error(`assembly/${entry}.ts does not compile:\n${stderr.toString()}`, { cause: error });
  return Uint8Array.from(wasm);
}

/**
 * Compiles all of them.
 * @returns {Promise<Record<string, Uint8Array>>} by name
 */
export async function compileKernels() {
  // The compiler is WebAssembly itself, and runs too briefly to be worth optimising: half the CPU time.
  setFlagsFromString("--liftoff-only");
  /** @type {Record<string, Uint8Array>} */
  const binaries = {};
  for (const [name, entry, variant] of /** @type {const} */ ([
    ["scalar", "exports", "scalar"],
    ["simd", "exports", "simd"],
    ["relaxed", "exports", "relaxed-simd"],
    ["coded", "coded", "simd"],
    ["extract-scalar", "extraction", "scalar"],
    ["extract-simd", "extraction", "simd"],
  ]))
    binaries[name] = await compile(entry, variant, name === "coded");
  return binaries;
}

/**
 * The files of dist/wasm.
 * @param {Record<string, Uint8Array>} binaries by name
 * @returns {[path: string, content: Uint8Array | string][]}
 * @throws {Error} when the binaries of the run time outgrow their budget
 */
export function kernelFiles(binaries) {
  let total = 0;
  const files = Object.entries(binaries).flatMap(([name, bytes]) => {
    const gzipped = gzipSync(bytes, { level: 9 }).byteLength;
    if (!name.startsWith("extract-")) total += gzipped;
    console.log(`wasm ${name}: ${bytes.byteLength} bytes, ${gzipped} gzipped`);
    const base64 = Buffer.from(bytes).toString("base64");
    return /** @type {[string, Uint8Array | string][]} */ ([
      [`wasm/${name}.wasm`, bytes],
      [`wasm/${name}.js`, `import { fromBase64 } from "../src/text.js";\nexport default fromBase64("${base64}");\n`],
      [`wasm/${name}.d.ts`, TYPE],
    ]);
  });
  if (total > MAX_BYTES)
    throw new Error(
      `The wasm binaries are ${total} bytes gzipped, the budget is ${MAX_BYTES}. Make the kernels smaller.`,
    );
  console.log(`wasm at run time: ${total} bytes gzipped, budget ${MAX_BYTES}`);
  return files;
}
