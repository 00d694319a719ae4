/**
 * Puts the shaders of this folder into dist/kernels/wgsl.js, one string for each file, named like it, which every bundler
 * accepts without configuration for assets. Comments and indentation are dropped; line breaks stay, so that a compiler's line
 * numbers are those of the files.
 */
import { readdirSync, readFileSync } from "node:fs";

const here = new URL(".", import.meta.url);

/** The files of dist/kernels. @returns {[path: string, content: string][]} */
export function shaderFiles() {
  const strings = readdirSync(here)
    .filter((name) => name.endsWith(".wgsl"))
    .sort()
    .map((name) => {
      const text = readFileSync(new URL(name, here), "utf8")
        .replace(/^ +| *\/\/.*$/gm, "")
        .trimEnd();
      return `export const ${name.slice(0, -".wgsl".length)} = ${JSON.stringify(text)};\n`;
    });
  return [
    ["kernels/wgsl.js", strings.join("")],
    ["kernels/wgsl.d.ts", readFileSync(new URL("wgsl.d.ts", here), "utf8")],
  ];
}
