/**
 * TF.js as it is published, on its backends cpu and wasm; `tfjs-chromium.test.ts` has the others. EIGENLORA_RUNTIMES names a folder
 * where `npm install` has put `@tensorflow/tfjs-core`, -layers, -converter and the backends, 4.22; what needs them is skipped by name
 * without, and fails when EIGENLORA_REQUIRE lists "tfjs".
 */
import { existsSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";
import t from "tap";
import { PACKAGES } from "./framework-browser.ts";
import { required } from "./required.ts";
import { type Modules, tfjsSuite } from "./tfjs-suite.ts";

const present = existsSync(join(PACKAGES, "@tensorflow/tfjs-core"));
const skip = !present && !required.has("tfjs") && "TF.js is not here; see EIGENLORA_RUNTIMES in this file";

for (const backend of ["cpu", "wasm"]) {
  t.test(`TF.js, ${backend}`, { skip }, async (t) => {
    const require = createRequire(join(PACKAGES, "of.js"));
    const tf = require("@tensorflow/tfjs-core") as Modules["tf"] & { setBackend(name: string): Promise<boolean> };
    require(`@tensorflow/tfjs-backend-${backend}`);
    t.ok(await tf.setBackend(backend));
    const { loadGraphModel } = require("@tensorflow/tfjs-converter") as Pick<Modules, "loadGraphModel">;
    tfjsSuite(t as never, { tf, layers: require("@tensorflow/tfjs-layers"), loadGraphModel });
  });
}
