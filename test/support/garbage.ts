/** Garbage collection for tests of what is kept. */
import { setFlagsFromString } from "node:v8";
import { runInNewContext } from "node:vm";

// The flag gives new contexts the function, and no others.
setFlagsFromString("--expose-gc");
export const collectGarbage = runInNewContext("gc") as () => void;
setFlagsFromString("--no-expose-gc");
