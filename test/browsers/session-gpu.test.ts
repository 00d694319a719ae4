/**
 * Mode "folded" on WebGPU in a real browser: the cost of a switch on bus and device, selections that restore every bit,
 * the order of runs and switches, and devices that are not the one given or are lost.
 */
import t, { type Test } from "tap";
import { addRuntimes, answerOf, bundle, launch, noChromium, openPage } from "../support/browser.ts";
import { skip, soak } from "../support/required.ts";
import { difference, golden, JSON_FEEDS, modelBytes, packBytes } from "../support/sessions.ts";

/** Most bytes of a switch beside the coefficients. */
const PARAMETER_BYTES = 4096;
const TOLERANCE = 1e-5;

const BUILDS = ["onnxruntime-web/webgpu", "onnxruntime-web"] as const;
/** The build that folds weights on the device; the other switches on the CPU. */
const [NATIVE, OLDER] = BUILDS;

/**
 * Calls of functions of browser-gpu.js, in the order of the tests below. Each page compiles all shaders: a build's
 * calls share it.
 */
const plan = new Map<string, string>();
const call = (name: string, ...values: unknown[]): string => {
  const code = `${name}(${["feeds", ...values.map((value) => JSON.stringify(value))].join(", ")})`;
  plan.set(code, values.includes(OLDER) ? OLDER : NATIVE);
  return code;
};

const THREE = [null, "two", "three", "five", { two: 0.5, three: 0.5 }];
/** Only the soak runs it: each model compiles its shaders. */
const FUSED = soak ? [call("switching", THREE, 20, "fused")] : [];
const SWITCHES = call("switching", [...THREE, { two: 1, five: -0.3 }, { three: 0.25 }], soak ? 120 : 8, "torchscript");
const PLACED = (
  [
    [NATIVE, "core"],
    [NATIVE, "factors"],
    [OLDER, "core"],
  ] as const
)
  .slice(0, soak ? 3 : 1)
  .map(([build, mode]) => ({ build, mode, code: call("placed", build, mode) }));
/** Bytes become floats for "int8": one of the two builds computes them wrongly. */
const SMALL = BUILDS.flatMap((build) => ["int4", "int8"].map((basis) => ({ build, basis })))
  .slice(0, soak ? 4 : 0)
  .map(({ build, basis }) => ({ name: `${build}, ${basis}`, basis, code: call("small", build, basis) }));
const GIVEN = BUILDS.slice(0, soak ? 2 : 1).map((build) => ({ build, code: call("given", build) }));
/**
 * Devices that are lost, last in their page. The soak loses one in each mode of each build, the gate one on the device
 * and one on the CPU.
 */
const LOST = BUILDS.flatMap((build) => (["folded", "core"] as const).map((mode) => ({ build, mode })))
  .filter(({ build, mode }) => soak || (build === NATIVE) === (mode === "folded"))
  .map(({ build, mode }) => ({ build, mode, code: call("lost", build, mode) }));
const AGAIN = call("again");

/** Results by call, of one page for each build; undefined where there is no adapter. */
async function report(): Promise<Map<string, any> | undefined> {
  const small = (basis: "int4" | "int8"): object => ({ select: { kind: "k", k: 6 }, dtype: { basis } });
  const files = new Map<string, Uint8Array>();
  for (const model of ["torchscript", "fused"]) files.set(`${model}.onnx`, modelBytes(model));
  for (const [name, options] of Object.entries({ tasks: undefined, int4: small("int4"), int8: small("int8") }))
    files.set(`${name}.eigen`, await packBytes(["adapters"], "base", options));
  await addRuntimes(files, ["asyncify", "jsep"]);
  const browser = await launch(t, ["--enable-unsafe-webgpu"]);
  const results = new Map<string, any>();
  // onnxruntime may hand out a lost device once more, so that a page can lose one device and no more.
  const pages = BUILDS.flatMap((build) => {
    const [, ...others] = LOST.filter((each) => each.build === build).map(({ code }) => code);
    const first = [...plan].flatMap(([code, of]) => (of === build && !others.includes(code) ? [code] : []));
    return [first, ...others.map((code) => [code])];
  });
  for (const calls of pages) {
    const code = `import { again, given, lost, placed, small, switching } from "./browser-gpu.js";
      const feeds = ${JSON.stringify(JSON_FEEDS)};
      const failed = ({ stack }) => ({ failed: stack });
      async function all() {
        if (!(await navigator.gpu?.requestAdapter())) return "no adapter";
        return [${calls.map((call) => `await ${call}.catch(failed)`).join(", ")}];
      }
      globalThis.answer = all();`;
    const page = await openPage(t, new Map([...files, ["page.js", await bundle(code)]]), browser);
    page.setDefaultTimeout(LIMIT);
    const answers = (await answerOf(page)) as "no adapter" | unknown[];
    if (answers === "no adapter") return undefined;
    calls.forEach((code, i) => results.set(code, answers[i]));
    await page.close();
  }
  return results;
}
let reported: ReturnType<typeof report> | undefined;

/**
 * Result of a call.
 * @returns undefined where there is no adapter, or where the call has failed, which fails the test
 */
async function resultOf(t: Test, code: string): Promise<any> {
  const results = await (reported ??= report());
  if (!results) skip(t, "chromium", "no adapter");
  const found = results?.get(code);
  if (found?.failed) t.fail(`${code}: ${found.failed}`);
  return found?.failed ? undefined : found;
}

const LIMIT = soak ? 3_600_000 : 240_000;
const options = { skip: noChromium, timeout: LIMIT };

for (const code of FUSED)
  t.test("queries, keys and values in one weight", options, async (t) => {
    const found = await resultOf(t, code);
    if (!found) return;
    t.match(found, { mode: "folded", probe: { result: "passed" } });
    ["base", "two", "three", "five"].forEach((task, i) => {
      const off = difference(found.known[i], golden("base", task));
      t.ok(off <= TOLERANCE, `${task}: off by ${off}`);
    });
    t.same(found.wrong, [], "a selection that comes back is the same bit by bit");
  });

t.test("switches", options, async (t) => {
  const found = await resultOf(t, SWITCHES);
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

for (const { build, mode, code } of PLACED) {
  t.test(`${build}, mode "${mode}": a task is sent once a switch, and by no run`, options, async (t) => {
    const report = await resultOf(t, code);
    if (!report) return;
    const { found, expected, inOrder, memory, held, left } = report;
    for (const { task, answers, bytesFed, switched, run } of found) {
      const off = difference(answers, golden("base", task ?? "base"));
      t.ok(off <= TOLERANCE, `${task}: off by ${off}`);
      t.ok(
        bytesFed > 1000 && switched.written === bytesFed,
        `${task}: ${switched.written} of ${bytesFed} bytes written`,
      );
      // Two kinds of inputs stay on the CPU: shapes of the added kernels, and indices of rows, which are 64-bit
      // integers.
      const more = run.sent - expected.sent;
      t.equal(more, found[0].run.sent - expected.sent, `${task}: what a run sends does not depend on the task`);
      t.ok(more < 2048, `${task}: a run sends ${more} bytes more than without tasks`);
    }
    t.ok(inOrder, "each run answers for the switch before it");
    t.ok(memory.active >= held && held > 0, `${held} bytes of ours on the device`);
    t.equal(left, 0, "none is left");
  });
}

for (const { name, basis, code } of SMALL) {
  t.test(`components stay small on a GPU too: ${name}`, options, async (t) => {
    const found = await resultOf(t, code);
    if (!found) return;
    const { stored, f32 } = found;
    t.equal(stored.probe, "passed", name);
    t.equal(stored.bytes < f32.bytes / 2, basis === "int4", `${name}: ${stored.bytes} bytes instead of ${f32.bytes}`);
    stored.answers.forEach((answer: number[], task: number) => {
      const off = difference(answer, f32.answers[task]);
      t.ok(off <= TOLERANCE, `${name}, task ${task}: off by ${off}`);
    });
  });
}

t.test("a device of the caller's", options, async (t) => {
  for (const { build, code } of GIVEN) {
    const found = await resultOf(t, code);
    if (!found) continue;
    for (const [what, answer] of Object.entries(found.answers as Record<string, number[]>)) {
      const off = difference(answer, golden("base", what.split(",")[0]!));
      t.ok(off <= TOLERANCE, `${build}, ${what}: off by ${off}`);
    }
    t.match(found, { probe: { result: "passed" }, otherReason: "asked for", usable: true, live: 0 });
    const unused = "; onnxruntime does not use the device it was given; the weights are on its own";
    t.equal(found.reason, `asked for${build === NATIVE ? "" : unused}`);
  }
});

t.test("a device that is lost", options, async (t) => {
  const gone = { tag: "backend", message: /device was lost/ };
  for (const { build, mode, code } of LOST) {
    const found = await resultOf(t, code);
    if (!found) continue;
    // The CPU switches in mode "core".
    const folded = { run: gone, change: gone, next: gone, after: { run: gone, again: gone, switch: gone }, live: 0 };
    const core = { run: gone, next: gone, after: { run: gone, again: gone, switch: "fulfilled" } };
    const expected = { ...(mode === "folded" ? folded : core), release: "fulfilled", told: { message: /./ } };
    t.match(found, expected, `${build}, ${mode}`);
  }
  const again = await resultOf(t, AGAIN);
  if (again) t.ok(difference(again, golden("base", "two")) <= TOLERANCE, "a new session works");
});
