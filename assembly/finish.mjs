/**
 * Runs after the compiler and the bundles of libraries: embeds the shaders, drops the compiler's source maps of bundled files, and marks
 * the command line as executable, for use from a checkout; npm does so for installs.
 */
import { chmodSync, existsSync, rmSync } from "node:fs";
import { embedKernels } from "../kernels/build.mjs";

embedKernels();
for (const bundle of ["onnx/protobuf", "format/msgpackr", "cli/commander"])
  rmSync(new URL(`../dist/src/${bundle}.js.map`, import.meta.url), { force: true });
const main = new URL("../dist/src/cli/main.js", import.meta.url);
if (existsSync(main)) chmodSync(main, 0o755);
