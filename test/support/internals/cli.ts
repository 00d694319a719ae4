/**
 * Reaches inside the built package for tests: the command line in this process, with its disk, clock or output
 * replaced.
 */

export { downloading, Run } from "../../../dist/src/cli/command.js";
export { openScratch, takeLock, writeTogether, writeWhole } from "../../../dist/src/cli/files.js";
export { openModel, readExamples, readQuestions } from "../../../dist/src/cli/model.js";
export * from "../../../dist/src/cli/output.js";
export { runProgram } from "../../../dist/src/cli/program.js";

/**
 * Where commands lie as modules, for processes that run one of them alone, and files that a test replaces the disk of.
 */
export const COMMAND_LINE: URL = new URL("../../../dist/src/cli/", import.meta.url);
export const FILES = "../../dist/src/cli/files.js";
export type Files = typeof import("../../../dist/src/cli/files.js");

/**
 * Files whose text is checked in the installed package: a library's licence, and types that every entry brings along.
 */
export const MSGPACKR = "dist/src/format/msgpackr.js";
export const GLOBALS = "dist/src/globals.d.ts";

/** A file that a bundle is made of, to weigh it alone. */
export const WEBGPU = "dist/src/backends/webgpu.js";
