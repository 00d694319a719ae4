/**
 * TF.js as published, on its backends cpu and wasm, and on webgl and webgpu in Chromium. EIGENLORA_RUNTIMES names a
 * folder where `npm install` has put `@tensorflow/tfjs-core`, -layers, -converter and the backends, 4.22, and
 * `basic-pitch` is the package `@spotify/basic-pitch` 1.0, unpacked. Tests that need them are skipped by name without,
 * and fail when EIGENLORA_REQUIRE lists "tfjs".
 */
import { readFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { join } from "node:path";
import { createRuntime, openPack } from "eigenlora";
import { buildPack } from "eigenlora/build";
import { tfjsHost } from "eigenlora/tfjs";
import t from "tap";
import { adapterOf } from "../support/adapters.ts";
import { noChromium } from "../support/browser.ts";
import { difference } from "../support/compare.ts";
import { inChromium } from "../support/framework-browser.ts";
import { asKernel, inputs } from "../support/frameworks.ts";
import { concat, LOSSLESS } from "../support/packs.ts";
import { packages, runtimes, without } from "../support/required.ts";
import { type Modules, tfjsSuite } from "../support/tfjs-suite.ts";

const skip = without("tfjs", packages("@tensorflow/tfjs-core"));

for (const backend of ["cpu", "wasm"]) {
  t.test(`TF.js, ${backend}`, { skip }, async (t) => {
    const require = createRequire(packages("of.js"));
    const tf = require("@tensorflow/tfjs-core") as Modules["tf"] & { setBackend(name: string): Promise<boolean> };
    require(`@tensorflow/tfjs-backend-${backend}`);
    t.ok(await tf.setBackend(backend));
    const { loadGraphModel } = require("@tensorflow/tfjs-converter") as Pick<Modules, "loadGraphModel">;
    tfjsSuite(t as never, { tf, layers: require("@tensorflow/tfjs-layers"), loadGraphModel });
  });
}

const pitch = runtimes("basic-pitch/model");
const noPitch = without("tfjs", pitch);

/** Spotify's published transcriber of music: convolutions of 3 × 39 and 5 × 5 in a graph of 400 nodes. */
t.test("a GraphModel that others have converted", { skip: skip || noPitch }, async (t) => {
  const require = createRequire(packages("of.js"));
  const tf = require("@tensorflow/tfjs-core");
  require("@tensorflow/tfjs-backend-wasm");
  t.ok(await tf.setBackend("wasm"));
  const { modelTopology, weightsManifest } = JSON.parse(await readFile(join(pitch, "model.json"), "utf8"));
  const weights = await readFile(join(pitch, "group1-shard1of1.bin"));
  const load = () => {
    const weightData = weights.buffer.slice(weights.byteOffset, weights.byteOffset + weights.length);
    const artifacts = { modelTopology, weightSpecs: weightsManifest[0].weights, weightData };
    return require("@tensorflow/tfjs-converter").loadGraphModel({ load: async () => artifacts });
  };
  const layers = [
    { name: "model_1.conv2d_1", out: 8, in: 8 * 3 * 39, kernel: [3, 39] },
    { name: "model_1.conv2d_4", out: 32, in: 8 * 5 * 5, kernel: [5, 5] },
  ].map((layer) => ({ ...layer, layout: "conv" as const, A: inputs(2 * layer.in), Bt: inputs(2 * layer.out) }));
  const modules = layers.map(({ A, Bt, ...layer }) => ({ ...layer, rank: 2, read: async () => ({ rank: 2, A, Bt }) }));
  const { chunks } = await buildPack([adapterOf("a", modules)], LOSSLESS);

  const [model, byHand] = [await load(), await load()];
  for (const { name, out, in: width, kernel, A, Bt } of layers) {
    const list = byHand.weights[`StatefulPartitionedCall/${name.replace(".", "/")}/Conv2D_weights`];
    const difference = Float32Array.from({ length: out * width }, (_, i) => {
      const [row, column] = [Math.floor(i / width), i % width];
      return Bt[row]! * A[column]! + Bt[out + row]! * A[width + column]!;
    });
    const { data, shape } = asKernel({ shape: [out, width / (kernel[0]! * kernel[1]!), ...kernel], data: difference });
    list[0] = tf.keep(tf.add(list[0], tf.tensor(data, shape)));
  }
  const sound = tf.tensor(inputs(43844), [1, 43844, 1]);
  const notes = async (of: { predict(x: unknown): { data(): Promise<Float32Array> }[] }): Promise<Float32Array> =>
    (await of.predict(sound)[1]!.data()).slice();
  const runtime = await createRuntime(await openPack(concat(chunks)), { base: tfjsHost(tf, model) });
  const before = await notes(model);
  const { numTensors } = tf.memory();
  await runtime.switchTask("a");
  t.equal(tf.memory().numTensors, numTensors);
  const [found, expected] = [await notes(model), await notes(byHand)];
  const off = difference(found, expected);
  t.ok(off < 1e-5, `${found.length} numbers, ${off} apart at most`);
  t.ok(difference(found, before) > 0.01, "the task makes a difference");
  await runtime.switchTask(null);
  t.ok(difference(await notes(model), before) === 0, "the base's own answer");
});

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
