// @ts-nocheck: it runs what no type describes
/**
 * Mutants of packs and task files, as in mutants.test.ts, as many as wanted. Half of them in each of two processes, since a machine
 * has two cores or more. A million take 40 minutes of one core, 20 of two. Where Python is there, accepted ones are compared with
 * what it reads.
 *
 * usage: node test/soak-fuzz.js COUNT [FIRST]
 */
import { spawn } from "node:child_process";
import { fileURLToPath } from "node:url";
import { runMutants } from "./mutants/run.js";
import { pythonLacks } from "./required.ts";

const [count, first = 1, child] = process.argv.slice(2).map(Number);
if (!Number.isSafeInteger(count) || count < 1) throw new RangeError(`COUNT: expected a number, got ${process.argv[2]}`);

if (child) {
  const started = performance.now();
  const { taken, folded, refused, wrong } = await runMutants(first, count, !pythonLacks("numpy"), (done, wrong) => {
    const seconds = Math.round((performance.now() - started) / 1000);
    if (done % 100_000 === 0) console.log(`${first} + ${done}: ${wrong.length} wrong, ${seconds} s`);
  });
  console.log(JSON.stringify({ first, count, taken, folded, refused, wrong: wrong.slice(0, 20) }));
  process.exitCode = wrong.length > 0 ? 1 : 0;
} else {
  const half = Math.ceil(count / 2);
  const codes = await Promise.all(
    [
      [half, first],
      [count - half, first + half],
    ].map(
      ([many, from]) =>
        new Promise((resolve) => {
          const args = [fileURLToPath(import.meta.url), String(many), String(from), "1"];
          if (many === 0) resolve(0);
          else spawn(process.execPath, args, { stdio: "inherit" }).on("exit", resolve);
        }),
    ),
  );
  process.exitCode = codes.every((code) => code === 0) ? 0 : 1;
}
