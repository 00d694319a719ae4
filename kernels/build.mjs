/**
 * Puts the shaders of this folder into dist/kernels/wgsl.js, one string for each file, named like it, which every bundler
 * accepts without configuration for assets. Comments and indentation are dropped; line breaks stay, so that a compiler's line
 * numbers are those of the files.
 */
import { copyFileSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from "node:fs";

const here = new URL(".", import.meta.url);
const out = new URL("../dist/kernels/", import.meta.url);

/** Writes the module. */
export function embedKernels() {
  const strings = readdirSync(here)
    .filter((name) => name.endsWith(".wgsl"))
    .sort()
    .map((name) => {
      const text = readFileSync(new URL(name, here), "utf8")
        .replace(/^ +| *\/\/.*$/gm, "")
        .trimEnd();
      return `export const ${name.slice(0, -".wgsl".length)} = ${JSON.stringify(text)};\n`;
    });
  mkdirSync(out, { recursive: true });
  writeFileSync(new URL("wgsl.js", out), strings.join(""));
  copyFileSync(new URL("wgsl.d.ts", here), new URL("wgsl.d.ts", out));
}
