/**
 * Puts the shaders of this folder into dist/kernels/wgsl.js, one string for each kernel, named like its file, which
 * every bundler accepts without configuration for assets. Comments and indentation are dropped; line breaks stay, so
 * that a compiler's line numbers are those of the files. `decoded.wgsl` lies behind each.
 */
import { readFileSync } from "node:fs";

const read = (/** @type {string} */ name) => readFileSync(new URL(name, import.meta.url), "utf8");
const shader = (/** @type {string} */ name) => read(`${name}.wgsl`).replace(/^ +| *\/\/.*$/gm, "");

/** The files of dist/kernels. @returns {[path: string, content: string][]} */
export function shaderFiles() {
  const decoded = shader("decoded").trim();
  const strings = ["components", "fold", "scale"].map(
    (name) => `export const ${name} = ${JSON.stringify(shader(name) + decoded)};\n`,
  );
  return [
    ["kernels/wgsl.js", strings.join("")],
    ["kernels/wgsl.d.ts", read("wgsl.d.ts")],
  ];
}
