/**
 * One call of the AssemblyScript compiler with the flags that every kernel of this package needs. Used by the build
 * and, for a kernel that is not shipped, by the benchmarks.
 */

import { fileURLToPath } from "node:url";

/** Compiler switches of each build, by the variant's name. */
export const FEATURES = {
  scalar: [],
  simd: ["--enable", "simd"],
  "relaxed-simd": ["--enable", "simd", "--enable", "relaxed-simd"],
};

/**
 * Compiles one entry of this folder. Memory is imported, so that the caller decides when it grows; there is no garbage collector and no
 * static data.
 * @param {string} entry name of the file without ".ts"
 * @param {keyof typeof FEATURES} variant
 * @param {boolean} [small] fewer bytes before a few per cent of speed. Default: false
 * @returns {Promise<Uint8Array<ArrayBuffer>>} the module's bytes
 * @throws {Error} with the compiler's own output
 */
export async function compile(entry, variant, small = false) {
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
