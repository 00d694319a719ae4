/** Runs command lines in a process, one after the other, as its parent sends them: for test/writers.js. */

let runs = 0;
let said = "";
for (const stream of [process.stdout, process.stderr])
  stream.write = (/** @type {string | Uint8Array} */ text) => {
    said += text;
    return true;
  };

process.on("message", async (/** @type {string[]} */ argv) => {
  process.argv.splice(2, Infinity, ...argv, "--json");
  // The command line runs when it is imported, once for each address.
  await import(`../dist/src/cli/main.js?${++runs}`);
  if (process.connected) process.send?.({ code: process.exitCode, said });
  said = "";
});
process.send?.("ready");
