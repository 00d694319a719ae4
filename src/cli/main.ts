#!/usr/bin/env node
/**
 * The command line: `eigenlora COMMAND …`. Exits 0, 1 (failed), 2 (usage), 3 (out of time) or 130 (interrupted).
 */
import "./telemetry.ts";
import { runProgram } from "./program.ts";

// Who reads may have gone, as head does: the work goes on, and what is left to say is said to nobody.
for (const stream of [process.stdout, process.stderr])
  stream.on("error", (error: NodeJS.ErrnoException) => {
    if (error.code !== "EPIPE") throw error;
  });

process.exitCode = await runProgram(process.argv.slice(2), process.stdout, process.stderr);
