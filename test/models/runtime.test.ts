import { createRuntime, openPack, type Runtime, type Tensor } from "eigenlora";
import { buildPack } from "eigenlora/build";
import { readAdapters } from "eigenlora/node";
import t from "tap";
import { backends, labelOf } from "../support/backend-list.ts";
import { seededTensors } from "../support/bases.ts";
import { bytesOf, checkGolden, tensorsOf } from "../support/compare.ts";
import { memoryHost } from "../support/internals/runtime.ts";
import { concat, data, goldenPacks, LOSSLESS, packOf, termDelta } from "../support/packs.ts";
import { chance } from "../support/random-packs.ts";
import { soak } from "../support/required.ts";
import { packFor } from "../support/sessions.ts";

let packed: ReturnType<typeof goldenPacks> | undefined;
for (const options of await backends()) {
  t.test(`${labelOf(options)}: PEFT's goldens through pack and runtime`, async (t) => {
    const goldens = await (packed ??= goldenPacks());
    t.ok(goldens.length >= 22, `${goldens.length} goldens`);
    for (const golden of goldens) await checkGolden(t, golden, options);
  });
}

t.test("heads of other sizes come and go, and the caller's array is the head again", async (t) => {
  const base = new Map<string, Tensor>();
  for (const [name, tensor] of await tensorsOf(data("sessions/base.safetensors")))
    base.set(name, { dtype: "f32", ...tensor });
  const name = [...base.keys()].find((one) => one.endsWith("classifier.weight"))!;
  // A base of two labels, as one of the tasks.
  for (const one of [name, name.replace(".weight", ".bias")]) {
    const { shape, data } = base.get(one)!;
    const width = shape[1] ?? 1;
    base.set(one, { dtype: "f32", shape: [2, ...shape.slice(1)], data: (data as Float32Array).slice(0, 2 * width) });
  }
  const own = base.get(name)!;
  const [tensor, pristine] = [own.data as Float32Array, (own.data as Float32Array).slice()];
  const runtime = await createRuntime(await packFor("base"), { base });
  t.teardown(() => runtime.close());
  const inPlace = async (task: string | null): Promise<boolean> => {
    await runtime.switchTask(task);
    return base.get(name) === own;
  };
  t.ok(await inPlace("two"));
  const second = tensor.slice();
  t.notSame(second, pristine);
  t.notOk(await inPlace("five"), "five labels do not fit");
  t.ok(await inPlace("two"));
  t.same(tensor, second);
  t.notOk(await inPlace("three"));
  t.ok(await inPlace(null));
  t.same(tensor, pristine);
});

const TASKS = ["debtags-role", "debtags-game", "sections-1", "debtags-use"];

const { bytes: packBytes } = await packOf(TASKS.map((n) => `adapters/own-seed/${n}`));
const { bytes: smallPack } = await packOf(
  TASKS.map((n) => `adapters/own-seed/${n}`),
  {},
  (m) => m.includes("layer.0.attention.self.v"),
);

for (const options of await backends()) {
  const label = labelOf(options);
  // A device reads everything back for a host that is written; webgpu.test.ts has 500 on weights that stay there.
  const switches = soak ? 10_000 : typeof options.backend === "object" ? 60 : 200;
  t.test(`${label}: ${switches} random switches without drift; warm ones allocate and read nothing`, async (t) => {
    const pack = await openPack(smallPack);
    const base = seededTensors(pack.modules, "f32");
    const stateOf = (): string =>
      [...base].map(([name, { data }]) => `${name} ${Buffer.from(data.buffer).toString("base64")}`).join();
    const seen = new Map<string | null, string>([[null, stateOf()]]);
    const runtime = await createRuntime(pack, { ...options, base });
    const random = chance(5);
    for (let i = 0; i < switches; i++) {
      const task = random.of([...TASKS, null]);
      const report = await runtime.switchTask(task);
      const earlier = seen.get(task);
      if (earlier && earlier !== stateOf()) throw new Error(`${task} is not what it was, at switch ${i}`);
      if (i > 100 && report.allocated > 0) throw new Error(`a warm switch allocated ${report.allocated} bytes`);
      if (earlier && report.requests > 0) throw new Error("a resident task was read again");
      seen.set(task, stateOf());
    }
    t.equal(seen.size, 5);
    await runtime.close();
  });

  t.test(`${label}: blends, strengths and unfolded terms are one arithmetic`, async (t) => {
    const pack = await openPack(packBytes);
    const base = seededTensors(pack.modules, "f32");
    const name = pack.modules[3]!.name;
    const weight = `${name.replace("bert.", "")}.weight`;
    // A weight of 0 becomes the change itself, without rounding.
    base.get(weight)!.data.fill(0);
    const folded = await createRuntime(pack, { ...options, base });
    const change = async (selection: Parameters<Runtime["switchTask"]>[0]): Promise<Float64Array> => {
      await folded.switchTask(
        selection,
        typeof selection === "object" && selection ? { head: Object.keys(selection)[0]! } : {},
      );
      return Float64Array.from(base.get(weight)!.data);
    };
    const a = await change("debtags-role");
    const b = await change("debtags-game");
    const blend = await change({ "debtags-role": 0.7, "debtags-game": -0.4 });
    const peak = a.reduce((p, v) => Math.max(p, Math.abs(v)), 0);
    const off = blend.reduce((p, v, i) => Math.max(p, Math.abs(v - 0.7 * a[i]! + 0.4 * b[i]!)), 0);
    t.ok(off / peak < 1e-5, `blend off by ${off / peak}`);
    t.same(await change({ "debtags-role": 1 }), a, "strength 1 is the task itself");
    for (const mode of ["core", "factors"] as const) {
      const unfolded = await createRuntime(pack, { ...options, mode });
      for (const [selection, expected] of [
        ["debtags-role", a],
        [{ "debtags-role": 0.7, "debtags-game": -0.4 }, blend],
      ] as const) {
        await unfolded.switchTask(selection, typeof selection === "object" ? { head: "debtags-role" } : {});
        const term = unfolded.term(name)!;
        const got = await termDelta(term, pack, name);
        const worst = got.reduce((p, v, i) => Math.max(p, Math.abs(v - expected[i]!)), 0);
        t.ok(worst / peak < 2e-6, `${mode}: off by ${worst / peak}`);
        t.ok(term.rank >= 1);
        t.equal(term.A.length, term.rank * pack.modules[3]!.in);
        if (mode === "core") t.ok(term.core);
      }
      await unfolded.switchTask(null);
      t.equal(unfolded.term(name), undefined);
      await unfolded.close();
    }
    await folded.close();
  });
}

t.test("heads: blended with equal labels, else one is named", async (t) => {
  const pack = await openPack(packBytes);
  const base = seededTensors(pack.modules, "f32");
  const runtime = await createRuntime(pack, { backend: "js", base });
  await t.rejects(runtime.switchTask({ "debtags-role": 0.5, "debtags-game": 0.5 }), {
    tag: "task",
    message: /different labels.*head/s,
  });
  t.equal(runtime.task, null);
  const report = await runtime.switchTask({ "debtags-role": 0.5, "debtags-game": 0.5 }, { head: "debtags-game" });
  t.same(report.added, ["classifier.bias", "classifier.weight"]);
  const game = runtime.weight("classifier.weight");
  t.equal(game.shape[0], pack.tasks.get("debtags-game")!.metadata.labels!.length);
  await t.rejects(runtime.switchTask({ "debtags-role": 1 }, { head: "debtags-game" }), /is not one of the tasks/);
  await runtime.close();
});

t.test("switches that are refused change nothing; the others are queued", async (t) => {
  const pack = await openPack(packBytes);
  const runtime = await createRuntime(pack, { backend: "js", base: seededTensors(pack.modules, "f32") });
  await runtime.switchTask("debtags-role");
  await t.rejects(runtime.switchTask("debtags-roles"), { tag: "task", nearest: ["debtags-role"], message: /nearest/ });
  await t.rejects(runtime.switchTask("debtags-game", { signal: AbortSignal.abort() }), { name: "AbortError" });
  t.equal(runtime.task, "debtags-role");
  await t.rejects(runtime.switchTask({}), RangeError);
  await t.rejects(
    runtime.switchTask({ "debtags-game": NaN }),
    /strength of "debtags-game": expected a finite number, got NaN/,
  );
  const order: unknown[] = [];
  await Promise.all(
    ["debtags-game", null, "sections-1"].map(async (task) => order.push((await runtime.switchTask(task)).task)),
  );
  t.same(order, ["debtags-game", null, "sections-1"], "calls are queued");
  const last = runtime.switchTask("debtags-use");
  await runtime.close();
  t.equal((await last).task, "debtags-use", "dispose waits for what was asked before");
  await t.rejects(runtime.switchTask(null), { tag: "backend", message: /closed/ });
  t.throws(() => runtime.weight("x"), /closed/);
});

t.test("the wrong base is named", async (t) => {
  const right = seededTensors((await openPack(packBytes)).modules, "f32");
  const adapters = await readAdapters([data("adapters/own-seed/debtags-role")]);
  const { chunks } = await buildPack(adapters, { base: memoryHost(right) });
  const marked = concat(chunks);
  const attach = async (base: Map<string, Tensor>, more = {}): Promise<Runtime> =>
    createRuntime(await openPack(marked), { backend: "js", base, ...more });
  t.ok(await attach(right));
  const other = seededTensors((await openPack(packBytes)).modules, "f32");
  for (const [k, v] of other) other.set(k, { ...v, data: Float32Array.from(v.data).reverse() });
  await t.rejects(attach(other), { tag: "base", message: /fingerprints correlate by/ });
  t.ok(await attach(other, { anyBase: true }));
  const halved = new Map(
    [...right].map(([k, v]) => [
      k,
      {
        ...v,
        dtype: "bf16" as const,
        data: Uint16Array.from(new Uint32Array((v.data as Float32Array).slice().buffer), (b) => b >>> 16),
      },
    ]),
  );
  t.ok(await attach(halved), "the same model as bf16 is the same model");
  const missing = new Map([...right].slice(1));
  await t.rejects(attach(missing), { tag: "base", message: /is not in the base; candidates: .*option `names`/s });
  const renamed = new Map([...right].map(([k, v]) => [k.replace("query", "q"), v]));
  await t.rejects(attach(renamed), { tag: "base", message: /is not in the base/ });
  const names = new Map(
    (await openPack(marked)).modules.map((m) => [
      m.name,
      `${m.name.replace("bert.", "").replace("query", "q")}.weight`,
    ]),
  );
  t.ok(await attach(renamed, { names }));
  const twice = new Map([
    ...right,
    ...[...right].map(([k, v]) => [`a.bert.${k}`, v] as const),
    ...[...right].map(([k, v]) => [`b.bert.${k}`, v] as const),
  ]);
  await t.rejects(attach(twice), { tag: "base", message: /matches several weights/ });
  const wide = new Map([...right].map(([k, v]) => [k, { ...v, shape: [192, 768] }]));
  await t.rejects(attach(wide), { tag: "base", message: /\[out 384, in 384\].*\[192, 768\]/s });
  await t.rejects(createRuntime(await openPack(packBytes), { mode: "folded" }), /needs a base/);
  await t.rejects(createRuntime(await openPack(packBytes), { backend: "cuda" as never }), RangeError);
});

t.test("policy reload: half the memory, the same bits", async (t) => {
  const folder = data("goldens/peft/plain");
  const [adapter] = await readAdapters([`${folder}/adapter`]);
  const { chunks } = await buildPack([adapter!], LOSSLESS);
  const base = `${folder}/base.safetensors`;
  const pack = await openPack(concat(chunks));
  const copy = await createRuntime(pack, { base });
  const reload = await createRuntime(pack, { base, policy: "reload" });
  for (const task of ["adapter", null, "adapter"]) {
    await copy.switchTask(task);
    await reload.switchTask(task);
    for (const { name } of pack.modules)
      t.strictSame(bytesOf(copy.weight(name)), bytesOf(reload.weight(name)), `${task}: ${name}`);
  }
  t.equal(reload.memory().pristine, 0);
  t.equal(copy.memory().pristine, copy.memory().active);
  await t.rejects(
    createRuntime(pack, { base: seededTensors(pack.modules, "f32"), policy: "reload" }),
    /read from a file/,
  );
  await copy.close();
  await reload.close();
  await adapter!.close();
});
