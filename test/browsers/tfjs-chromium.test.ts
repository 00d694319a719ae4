/** TF.js as published, on its backends webgl and webgpu in Chromium. Skipped like `tfjs.test.ts`. */
import t from "tap";
import { noChromium } from "../support/browser.ts";
import { inChromium } from "../support/framework-browser.ts";
import { packages, without } from "../support/required.ts";

const skip = without("tfjs", packages("@tensorflow/tfjs-core"));

const SCRIPT = `import * as tf from "@tensorflow/tfjs-core";
  import * as layers from "@tensorflow/tfjs-layers";
  import { loadGraphModel } from "@tensorflow/tfjs-converter";
  import "@tensorflow/tfjs-backend-webgl";
  import "@tensorflow/tfjs-backend-webgpu";
  import { record } from "./stand-in.ts";
  import { tfjsSuite } from "./tfjs-suite.ts";
  globalThis.run = (backend) => record(backend, async (t) => {
    t.ok(await tf.setBackend(backend), "the backend starts");
    await tf.ready();
    tfjsSuite(t, { tf, layers, loadGraphModel });
  });`;

t.test("TF.js", { skip: skip || noChromium }, (t) => inChromium(t, SCRIPT, ["webgl", "webgpu"]));
