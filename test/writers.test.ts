import t from "tap";
import { soak } from "./required.ts";
import { raceWriters } from "./writers.js";

t.test(
  "two writers at once, stopped and killed now and then: nothing lost, nothing broken, every exit 0 is true",
  async (t) => {
    const ends = await raceWriters(soak ? 500 : 16);
    t.comment(JSON.stringify(ends));
    for (const [what, count] of Object.entries(ends)) t.ok(count > 0, `${count} ${what}`);
  },
);
