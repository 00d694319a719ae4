/**
 * Runs scripts that read their arguments and exit, one after the other in this process, and reports the output of each.
 *
 * usage: node benchmarks-child.js FOLDER_URL SCRIPTS ARGUMENTS      JSON: names, and a list of arguments for each run
 */
import { fileURLToPath } from "node:url";

const [folder, scripts, given] = process.argv.slice(2);
const write = process.stdout.write.bind(process.stdout);
/** @type {Record<string, { code: number | undefined, stdout: string, stderr: string }[]>} */
const ended = {};
for (const script of JSON.parse(scripts)) {
  ended[script] = [];
  for (const [i, args] of JSON.parse(given).entries()) {
    const { href } = new URL(script, folder);
    const one = { code: /** @type {number | undefined} */ (undefined), stdout: "", stderr: "" };
    for (const stream of /** @type {const} */ (["stdout", "stderr"]))
      process[stream].write = /** @type {any} */ (
        (/** @type {string} */ text) => {
          if (one.code === undefined) one[stream] += text;
        }
      );
    // A script that catches this error has ended all the same.
    const exited = new Error("exited");
    process.exit = (code) => {
      one.code ??= Number(code);
      throw exited;
    };
    process.argv = [process.execPath, fileURLToPath(href), ...args];
    // The query makes it another module: it runs again.
    await import(`${href}?${i}`).catch((error) => (one.stderr += error === exited ? "" : error.stack));
    ended[script].push(one);
  }
}
write(JSON.stringify(ended));
