/** Runs test/support/smoke.js on a command line: Node, Deno, Bun. */
import process from "node:process";
import { smokeAll } from "./smoke.js";

console.log(JSON.stringify(await smokeAll(process.argv[2] ?? "")));
