/** Last step of the build: marks the command line as executable, for use from a checkout. npm does it for installs. */
import { chmodSync, existsSync } from "node:fs";

const main = new URL("../dist/src/cli/main.js", import.meta.url);
if (existsSync(main)) chmodSync(main, 0o755);
