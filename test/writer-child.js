/** A process that runs command lines, one after the other, as its parent sends them: for test/writers.js. */
import { runProgram } from "../dist/src/cli/program.js";

process.on("message", async (/** @type {string[]} */ argv) => {
  let said = "";
  const stream = { write: (/** @type {string} */ text) => (said += text) };
  const code = await runProgram([...argv, "--json"], stream, stream);
  if (process.connected) process.send?.({ code, said });
});
process.send?.("ready");
