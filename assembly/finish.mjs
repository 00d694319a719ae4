/**
 * Last step of the build: embeds the shaders, and marks the command line as executable, for use from a checkout. npm does
 * that for installs.
 */
import { chmodSync, existsSync } from "node:fs";
import { embedKernels } from "../kernels/build.mjs";

embedKernels();
const main = new URL("../dist/src/cli/main.js", import.meta.url);
if (existsSync(main)) chmodSync(main, 0o755);
