/**
 * Five hundred pairs of writers of one pack at once (test/writers.js), stopped and killed now and then. Minutes; `npm run soak`.
 *
 * usage: node test/soak-writers.js [PAIRS] [SEED]
 */
import { raceWriters } from "./writers.js";

const [pairs = 500, seed = 1] = process.argv.slice(2).map(Number);
const started = performance.now();
const ends = await raceWriters(pairs, console.log, seed);
console.log(
  `${pairs} pairs: nothing lost, nothing broken; ${JSON.stringify(ends)} (${((performance.now() - started) / 1000).toFixed(0)} s)`,
);
