#!/usr/bin/env node
/**
 * The command line: `eigenlora COMMAND …`. Exits 0, 1 (failed) or 2 (usage).
 */
import "./telemetry.ts";
import { runProgram } from "./program.ts";

process.exitCode = await runProgram(process.argv.slice(2), process.stdout, process.stderr);
