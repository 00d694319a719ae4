#!/usr/bin/env node
/** The command line: `eigenlora COMMAND …`. Exits 0, 1 (failed), 2 (usage), 3 (out of time) or 130 (interrupted). */
import { runProgram } from "./program.ts";

// Since 1.29 native builds of onnxruntime keep a device id and events in the user's cache folder and upload them
// (onnxruntime's pull requests 27379 and 29843). onnxruntime-node reads the variable with its first session.
process.env["ORT_DISABLE_TELEMETRY"] ??= "1";

// The reader may close the pipe, as `| head` does: the work goes on without it.
for (const stream of [process.stdout, process.stderr])
  stream.on("error", (error: NodeJS.ErrnoException) => {
    if (error.code !== "EPIPE") throw error;
  });

process.exitCode = await runProgram(process.argv.slice(2), process.stdout, process.stderr);
