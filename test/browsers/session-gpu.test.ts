/**
 * Mode "folded" on WebGPU in a real browser: the cost of a switch on bus and device, selections that restore every bit, the order of runs
 * and switches, and devices that are not the one given or are lost.
 */
import t, { type Test } from "tap";
import { addRuntimes, answerOf, bundle, launch, noChromium, openPage } from "../support/browser.ts";
import { skip, soak } from "../support/required.ts";
import { difference, GOLDENS, golden, modelBytes, packBytes } from "../support/sessions.ts";

/** Most bytes of a switch beside the coefficients. */
const PARAMETER_BYTES = 4096;
const TOLERANCE = 1e-5;

/** Shared by all tests here: each opens a window of its own. */
const browser = noChromium ? undefined! : await launch(t, ["--enable-unsafe-webgpu"]);

/** Packs shared by all models here. */
const packs = new Map<string, Uint8Array>();
const small = (basis: "int4" | "int8"): object => ({ select: { kind: "k", k: 6 }, dtype: { basis } });
for (const [name, options] of Object.entries({ tasks: undefined, int4: small("int4"), int8: small("int8") }))
  packs.set(`${name}.eigen`, await packBytes(["adapters"], "base", options));

/** Calls functions of browser-gpu.js one after the other. @returns undefined where there is no adapter */
async function inBrowser(t: Test, calls: readonly string[], model = "torchscript"): Promise<any[] | undefined> {
  const feeds = Object.fromEntries(
    Object.entries(GOLDENS.feeds as Record<string, number[][]>)
      .filter(([name, rows]) => name !== "x" && Array.isArray(rows[0]))
      .map(([name, rows]) => [name, { type: "int64", dims: [rows.length, rows[0]!.length], data: rows.flat() }]),
  );
  const files = new Map<string, Uint8Array>([
    ["model.onnx", modelBytes(model)],
    ...packs,
    [
      "page.js",
      await bundle(`import { again, given, lost, placed, small, switching } from "./browser-gpu.js";
      const feeds = ${JSON.stringify(feeds)};
      async function all() {
        if (!(await navigator.gpu?.requestAdapter())) return "no adapter";
        return [${calls.map((call) => `await ${call}`).join(", ")}];
      }
      globalThis.answer = all();`),
    ],
  ]);
  await addRuntimes(files, ["asyncify", "jsep"]);
  const results = await answerOf(await openPage(t, files, browser));
  if (results !== "no adapter") return results as any[];
  skip(t, "chromium", "no adapter");
  return undefined;
}

const options = { skip: noChromium, timeout: soak ? 580_000 : 240_000 };

t.test("queries, keys and values in one weight", options, async (t) => {
  const selections = [null, "two", "three", "five", { two: 0.5, three: 0.5 }];
  const [found] =
    (await inBrowser(t, [`switching(feeds, ${JSON.stringify(selections)}, ${soak ? 20 : 3})`], "fused")) ?? [];
  if (!found) return;
  t.match(found, { mode: "folded", probe: { result: "passed" } });
  ["base", "two", "three", "five"].forEach((task, i) => {
    const off = difference(found.known[i], golden("base", task));
    t.ok(off <= TOLERANCE, `${task}: off by ${off}`);
  });
  t.same(found.wrong, [], "a selection that comes back is the same bit by bit");
});

t.test("switches", options, async (t) => {
  const selections = [null, "two", "three", "five", { two: 0.5, three: 0.5 }, { two: 1, five: -0.3 }, { three: 0.25 }];
  const [found] = (await inBrowser(t, [`switching(feeds, ${JSON.stringify(selections)}, ${soak ? 120 : 8})`])) ?? [];
  if (!found) return;
  t.match(found, { mode: "folded", reason: "asked for", probe: { result: "passed" } });
  t.equal(found.created, 1, "one InferenceSession");
  ["base", "two", "three", "five"].forEach((task, i) => {
    const off = difference(found.known[i], golden("base", task));
    t.ok(off <= TOLERANCE, `${task}: off by ${off}`);
  });
  t.same(found.wrong, [], "a selection that comes back is the same bit by bit, whoever asks");
  t.same(found.known[0], found.before, "null is what there was before the first switch");
  t.ok(found.back, "and after the last");

  const { basis, pristine, active, scratch } = found.memory;
  for (const { submits, written, coefficients, bytesOfCoefficients, bytesFed } of found.costs) {
    const idle = bytesOfCoefficients === 0;
    if (submits > 1 || coefficients > 1 || (!idle && submits + coefficients < 2))
      t.fail(`${submits} submits, ${coefficients} writes of coefficients`);
    if (written > bytesOfCoefficients + PARAMETER_BYTES)
      t.fail(`${written} bytes written for ${bytesOfCoefficients} of coefficients`);
    if (!(bytesFed >= pristine)) t.fail(`reports ${bytesFed} bytes`);
  }
  const most = Math.max(...found.costs.map(({ written }: { written: number }) => written));
  t.comment(
    `${found.costs.length} switches, at most ${most} bytes each; ${pristine} bytes of weights, live ${found.live}`,
  );
  t.ok(most < pristine / 2, "no weights cross the bus");
  t.equal(found.levels.length, 1, `live bytes are flat: ${found.levels.join(", ")}`);
  t.equal(basis, 0, "no components in the graph");
  t.ok(pristine > 0 && active >= pristine, "the weights that are read beside those that are folded from");
  t.ok(found.live > 2 * pristine && found.live <= 2 * pristine + scratch, "memory() counts all live buffers of ours");

  t.match(found.failures.unknown, { tag: "task", message: /"too".*two/ });
  t.match(found.failures.aborted, { name: "AbortError" });
  t.match(found.failures.abortedLater, { name: "AbortError" });
  t.match(found.failures.rows, { name: "TypeError", message: /one task per row needs mode "core" or "factors"/ });
  t.same(found.afterFailures, { same: true, task: "two" }, "the task before stays");
  t.equal(found.afterRelease, 0, "no buffer of ours is left");
  t.match(found.released, { tag: "backend", message: /is closed/ });
});

for (const [build, mode] of [
  ["onnxruntime-web/webgpu", "core"],
  ...(soak
    ? ([
        ["onnxruntime-web/webgpu", "factors"],
        ["onnxruntime-web", "core"],
      ] as const)
    : []),
] as const) {
  t.test(`${build}, mode "${mode}": a task is sent once a switch, and by no run`, options, async (t) => {
    const [report] = (await inBrowser(t, [`placed(feeds, "${build}", "${mode}")`])) ?? [];
    if (!report) return;
    const { found, expected, inOrder, memory, held, left } = report;
    for (const { task, answers, bytesFed, switched, run } of found) {
      const off = difference(answers, golden("base", task ?? "base"));
      t.ok(off <= TOLERANCE, `${task}: off by ${off}`);
      t.ok(
        bytesFed > 1000 && switched.written === bytesFed,
        `${task}: ${switched.written} of ${bytesFed} bytes written`,
      );
      // Two kinds of inputs stay on the CPU: shapes of the added kernels, and indices of rows, which are 64-bit integers.
      const more = run.sent - expected.sent;
      t.equal(more, found[0].run.sent - expected.sent, `${task}: what a run sends does not depend on the task`);
      t.ok(more < 2048, `${task}: a run sends ${more} bytes more than without tasks`);
    }
    t.ok(inOrder, "each run answers for the switch before it");
    t.ok(memory.active >= held && held > 0, `${held} bytes of ours on the device`);
    t.equal(left, 0, "none is left");
  });
}

t.test("a device of the caller's", options, async (t) => {
  const builds = ["onnxruntime-web/webgpu", "onnxruntime-web"];
  const results = await inBrowser(
    t,
    builds.map((build) => `given(feeds, "${build}")`),
  );
  if (!results) return;
  results.forEach((found, i) => {
    for (const [what, answer] of Object.entries(found.answers as Record<string, number[]>)) {
      const off = difference(answer, golden("base", what.split(",")[0]!));
      t.ok(off <= TOLERANCE, `${builds[i]}, ${what}: off by ${off}`);
    }
    t.match(found, { probe: { result: "passed" }, otherReason: "asked for", usable: true, live: 0 });
    t.equal(
      found.reason,
      i === 0 ? "asked for" : "asked for; onnxruntime does not use the device it was given; the weights are on its own",
    );
  });
});

t.test("a device that is lost", options, async (t) => {
  const gone = { tag: "backend", message: /device was lost/ };
  // One build folds weights on the device, the other switches on the CPU; the soak runs both with both.
  for (const build of ["onnxruntime-web/webgpu", "onnxruntime-web"]) {
    const native = build === "onnxruntime-web/webgpu";
    if (native || soak) {
      const calls = [`lost(feeds, "${build}")`, ...(native ? ["again(feeds)"] : [])];
      const [found, again] = (await inBrowser(t, calls)) ?? [];
      if (!found) return;
      t.match(found, { run: gone, change: gone, next: gone, after: { run: gone, again: gone, switch: gone } }, build);
      t.match(found, { release: "fulfilled", live: 0, told: { message: /./ } }, `${build}: released`);
      if (native) t.ok(difference(again, golden("base", "two")) <= TOLERANCE, "a new session works");
    }
    if (native && !soak) continue;
    const [core] = (await inBrowser(t, [`lost(feeds, "${build}", "core")`])) ?? [];
    t.match(
      core,
      {
        ...{ run: gone, next: gone, after: { run: gone, again: gone, switch: "fulfilled" }, release: "fulfilled" },
        told: { message: /./ },
      },
      `${build}, core`,
    );
  }
});

t.test("components stay small on a GPU too", options, async (t) => {
  const cases = ["int4", "int8"]
    .flatMap((basis) => ["onnxruntime-web/webgpu", "onnxruntime-web"].map((build) => [build, basis] as const))
    .filter(([build, basis]) => soak || (build === "onnxruntime-web") === (basis === "int8"));
  const results = await inBrowser(
    t,
    cases.map(([build, basis]) => `small(feeds, "${build}", "${basis}")`),
  );
  results?.forEach(({ stored, f32 }, i) => {
    const what = cases[i]!.join(", ");
    t.equal(stored.probe, "passed", what);
    // Bytes become floats there: one of the two builds computes them wrongly.
    const isSmall = cases[i]![1] === "int4";
    t.equal(stored.bytes < f32.bytes / 2, isSmall, `${what}: ${stored.bytes} bytes instead of ${f32.bytes}`);
    stored.answers.forEach((answer: number[], task: number) => {
      const off = difference(answer, f32.answers[task]);
      t.ok(off <= TOLERANCE, `${what}, task ${task}: off by ${off}`);
    });
  });
});
