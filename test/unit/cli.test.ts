import { spawnSync } from "node:child_process";
import * as fs from "node:fs";
import { copyFile, cp, mkdir, readdir, readFile, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { openPack } from "eigenlora";
import { encodeTaskFile } from "eigenlora/build";
import t from "tap";
import { json, run, words } from "../support/command-line.ts";
import { relativeDifference, tensorsOf } from "../support/compare.ts";
import { fromRoot, workIn } from "../support/folder.ts";
import { FILES, type Files } from "../support/internals/cli.ts";
import { layoutAppend } from "../support/internals/format.ts";
import { data } from "../support/packs.ts";

const main = fromRoot("dist/src/cli/main.js");
const folder = workIn(t);
const own = data("adapters/own-seed");
/** Components of a few adapters hold little of another one. */
const LOSSY = ["--max-loss", "1"];

/** Runs the command in a process of its own. */
function spawned(...args: string[]): { status: number | null; stdout: string; stderr: string } {
  return spawnSync(process.execPath, [main, ...args], { encoding: "utf8", cwd: folder });
}

const keys = (object: object, ...names: string[]): boolean => names.every((name) => name in object);

t.test("pack to a size, to an error, with less rank; auto says what it tried", async (t) => {
  const some = ["debtags-admin", "debtags-role", "sections-0"].map((id) => join(own, id));
  const sized = await json(0, "pack", ...some, "-o", "sized.eigen", "--bytes", "1/16");
  t.ok(sized["ratio"] >= 16 && sized["ratio"] < 17.5, `${sized["ratio"]}`);
  t.match(sized, { gauge: "balanced" });
  t.ok((await json(0, "pack", ...some, "-o", "sized.eigen", "--force", "--bytes", "300kB"))["bytes"] <= 300_000);
  const owned = await json(0, "pack", ...some, "-o", "owned.eigen", "--rank", "4", "--k", "4");
  const against = some.flatMap((path) => ["--against", path]);
  const verified = await json(0, "verify", "owned.eigen", ...against);
  for (const task of verified["tasks"])
    t.ok(Math.abs(task.error.max - owned["errors"].find(({ id }: any) => id === task.id).max) < 1e-4);

  const auto = await json(0, "pack", ...some, "-o", "auto.eigen", "--bytes", "70kB");
  t.ok(auto["bytes"] <= 70_000 && auto["tried"].length >= 1);
  const safe = await json(0, "pack", ...some, "-o", "safe.eigen");
  for (const { id, total } of safe["errors"]) t.ok(total <= 0.15 && total > 0.1, `${id}: ${total}`);
  const checked = await json(0, "verify", "safe.eigen", ...against);
  for (const [i, task] of checked["tasks"].entries())
    t.ok(Math.abs(task.error.total - safe["errors"][i].total) < 1e-4, `${task.error.total}`);
  const limited = await json(0, "pack", ...some, "-o", "e.eigen", "--error", "0.1");
  for (const { total } of limited["errors"]) t.ok(total <= 0.1 && total > 0.05, `${total}`);
  const lossless = await json(0, "pack", ...some, "-o", "l.eigen", "--energy", "1", "--dtype", "f32");
  t.ok(lossless["error"].max < 1e-6, `${lossless["error"].max}`);
  t.ok(lossless["ratio"] < 1.2, "below break-even a lossless pack is about as large as the adapters");
  const text = (await run("pack", ...some, "-o", "safe.eigen", "--force")).stdout;
  t.match(text, /ΔW error of a task, mean \/ largest +0 +1[45]\.\d % \/ 1[45]\.\d %/);
  t.match(text, /one task, on average +\d+\.\d kB +\d+\.\d kB/);
  t.match(text, /Nothing is shared/);
  t.match((await run("inspect", "safe.eigen")).stdout, /entropy-coded, every task made within 15.0 % of its ΔW/);
  t.equal((await json(0, "inspect", "safe.eigen"))["error"], 0.15);

  const refused = async (...args: string[]): Promise<string> =>
    (await json(2, "pack", ...some, "-o", "x.eigen", ...args))["error"].message;
  t.match(await refused("--bytes", "70kB", "--rank", "4"), /--rank and --bytes exclude each other: a size decides/);
  t.match(await refused("--error", "0.1", "--dtype", "int4"), /a size or an error decides; only head=/);
  t.match(await refused("--rank", "2"), /--rank needs --k or --energy/);
  t.match(await refused("--step", "0.05"), /--step needs --k or --energy/);
  t.match(await refused("--bytes", "70kB", "--text", "lines.txt"), /--text needs --model/);
  t.match(await refused("--k", "4", "--model", "model.onnx"), /--k and --model exclude each other: .*answers decide/);
  t.match(await refused("--bytes", "many"), /expected a size such as 300000, 300kB/);
  t.match(await refused("--bytes", "1kB", "--error", "0.1"), /--error and --bytes exclude each other/);
  t.match(
    (await json(1, "pack", ...some, "-o", "x.eigen", "--bytes", "1kB"))["error"].message,
    /1000 bytes are too few/,
  );
});

t.test("pack, inspect, verify: the keys of the contract, and figures that agree", async (t) => {
  const packed = await json(0, "pack", own, "-o", "own.eigen", "--k", "16");
  t.ok(
    keys(packed, ...words`file bytes tasks modules gauge centering dtype components adapterBytes`) &&
      keys(packed, ...words`ratio breakEvenTasks error seconds peakMemoryBytes warnings`),
  );
  t.match(packed, {
    tasks: 20,
    modules: 12,
    gauge: "as-trained",
    dtype: "f16",
    components: { min: 16, max: 16 },
  });
  const size = (await readFile(join(folder, "own.eigen"))).length;
  t.equal(packed["bytes"], size);
  t.same(packed["warnings"], []);
  t.match(packed["notes"], [/pass --base to store fingerprints/], "packed without a base");
  const inspected = await json(0, "inspect", "own.eigen");
  t.ok(keys(inspected, ...words`version bytes mode dtype basisBytes tasks modules sections breakEvenTasks`));
  t.equal(inspected["bytes"], size);
  t.equal(inspected["breakEvenTasks"], packed["breakEvenTasks"]);
  t.match(inspected["modules"][0], { out: 384, in: 384, componentsA: 16, componentsB: 16 });
  const verified = await json(0, "verify", "own.eigen", "--against", own);
  t.equal(verified["ok"], true);
  t.equal(verified["tasks"].length, 20);
  const worst = Math.max(...verified["tasks"].map((x: any) => x.error.max));
  t.ok(Math.abs(worst - packed["error"].max) < 1e-6, "packer and verifier agree");
  const damaged = await readFile(join(folder, "own.eigen"));
  for (const { name, offset } of inspected["sections"])
    if (/task (debtags-game|sections-2)|bases/.test(name)) damaged[offset + 20]! ^= 1;
  await writeFile(join(folder, "damaged.eigen"), damaged);
  const found = await json(1, "verify", "damaged.eigen", "--against", own);
  t.equal(found["ok"], false);
  const bad = found["checks"].filter((c: any) => c.ok === false);
  t.same(
    bad.map((c: any) => c.name),
    ["bases", "task debtags-game", "task sections-2"],
    "every damaged section is named",
  );
  for (const { detail } of bad) t.match(detail, /checksum does not match/);
  for (const command of ["inspect", "verify"]) t.match((await run(command, "own.eigen")).stdout, /debtags-role/);
});

t.test("every number format can be packed", async (t) => {
  let last = Infinity;
  for (const dtype of ["f32", "f16", "int8", "int4", "int3"]) {
    const packed = await json(
      0,
      ...words`pack ${join(own, "debtags-role")} ${join(own, "debtags-use")} -o ${dtype}.eigen --k 12 --dtype ${dtype}`,
    );
    t.ok(packed["bytes"] < last, dtype);
    last = packed["bytes"];
    t.equal((await json(0, "verify", `${dtype}.eigen`))["ok"], true);
  }
  t.match(await json(0, "pack", own, "-o", "m.eigen", "--k", "4", "--dtype", "basis=int8,head=f32"), {
    dtype: "basis=int8,coefficients=f16,head=f32",
  });
});

t.test("add appends, remove drops, and the others' bytes stay", async (t) => {
  const names = (await readdir(own)).sort();
  const bytesBefore = (
    await json(0, "pack", ...names.slice(0, 10).map((n) => join(own, n)), "-o", "grow.eigen", "--k", "24")
  )["bytes"];
  const blob = async (id: string): Promise<string> => {
    const { sections } = await json(0, "inspect", "grow.eigen");
    const { offset, bytes } = sections.find((s: any) => s.name === `task ${id}`);
    return (await readFile(join(folder, "grow.eigen"))).subarray(offset, offset + bytes).toString("hex");
  };
  const before = await blob(names[3]!);
  const added = await json(0, "add", "grow.eigen", join(own, names[10]!), join(own, names[11]!), ...LOSSY);
  t.match(added, { added: [names[10], names[11]], bytesBefore });
  t.equal(added["residual"].length, 2);
  t.ok(added["residual"][0].mean > 0 && added["residual"][0].max < 1.5);
  t.equal(added["bytesAfter"], (await readFile(join(folder, "grow.eigen"))).length);
  t.equal(await blob(names[3]!), before);
  const projected = (await json(0, "verify", "grow.eigen", "--against", join(own, names[10]!)))["tasks"].find(
    (x: any) => x.error,
  );
  t.ok(Math.abs(projected.error.mean - added["residual"][0].mean) < 1e-9);
  t.match(await json(1, "add", "grow.eigen", join(own, names[10]!)), { error: { tag: "task", message: /--as/ } });
  await json(0, "add", "grow.eigen", join(own, names[10]!), "--as", `${names[10]}=again`, ...LOSSY);
  const removed = await json(0, "remove", "grow.eigen", names[0]!, "again", "again");
  t.match(removed, { removed: [names[0], "again"] });
  t.ok(removed["bytesAfter"] < removed["bytesBefore"]);
  // The adapters of a pack that lost a task: the others are compared, and the one without a task is named.
  const against = await run("verify", "grow.eigen", "--against", own);
  t.equal(against.status, 0, against.stderr);
  t.match(against.stdout, new RegExp(`^adapter ${names[0]} +– +no such task in the pack`, "m"));
  const swapped = ["--against", join(own, names[1]!), "--as", `${names[1]}=${names[2]}`];
  t.match((await run("verify", "grow.eigen", ...swapped)).stderr, /differs from its adapter by \d+\.\d % /);
  t.equal(await blob(names[3]!), before);
  t.equal((await json(0, "verify", "grow.eigen"))["ok"], true);
  t.match(await json(1, "remove", "grow.eigen", "debtag-role"), { error: { tag: "task", nearest: ["debtags-role"] } });
  t.same(
    (await readdir(folder)).filter((n) => /tmp|lock/.test(n)),
    [],
    "nothing is left behind",
  );
});

t.test("add takes task files as they are, beside adapters", async (t) => {
  await json(0, "pack", join(own, "debtags-role"), join(own, "debtags-use"), "-o", "two.eigen", "--k", "8");
  const pack = await openPack(await readFile(join(folder, "two.eigen")));
  const { bytes } = await pack.load("debtags-use");
  const write = (name: string, id: string, basis: string, blob: Uint8Array = bytes): Promise<void> =>
    writeFile(join(folder, name), encodeTaskFile({ id, adapterBytes: 0, metadata: { labels: ["a"] } }, basis, blob));
  await write("mine.eigentask", "mine", pack.basisId);
  await write("no extension", "other", pack.basisId);
  const before = await readFile(join(folder, "two.eigen"));
  const added = await json(
    0,
    ...words`add two.eigen mine.eigentask ${join(own, "sections-0")} ${"no extension"} --as other=renamed --as sections-0=three ${LOSSY}`,
  );
  t.same(added["added"], ["three", "mine", "renamed"]);
  t.same(
    added["residual"].map((x: any) => x.id),
    ["three"],
    "a learned task loses nothing",
  );
  const after = await readFile(join(folder, "two.eigen"));
  t.equal(added["bytesAfter"], after.length);
  t.ok(
    after.subarray(1536, before.length).equals(before.subarray(1536)),
    "what was there stays, but for the superblock",
  );
  const grown = await openPack(after);
  t.same([...grown.tasks.keys()], ["debtags-role", "debtags-use", "three", "mine", "renamed"]);
  t.same((await grown.load("mine")).bytes, bytes);
  t.same(grown.tasks.get("mine")!.metadata, { labels: ["a"] });
  t.equal((await json(0, "verify", "two.eigen"))["ok"], true);
  t.match(
    (await run("add", "two.eigen", "mine.eigentask", "--as", "mine.eigentask=by path")).stdout,
    /by path: [\d.]+ kB, unchanged/,
  );

  const basis = pack.basisId;
  await write(
    "foreign.eigentask",
    "foreign",
    basis.replace(/^../, (byte) => (byte === "00" ? "01" : "00")),
  );
  const foreign = (await json(1, "add", "two.eigen", "foreign.eigentask"))["error"];
  t.match(foreign, {
    tag: "task",
    message: new RegExp(
      `foreign.eigentask belongs to the basis [0-9a-f]{64}, this pack has ${basis}; make it for this pack`,
    ),
  });
  t.match(await json(1, "add", "two.eigen", "mine.eigentask"), {
    error: { tag: "task", message: /two.eigen already has a task "mine"; .* --as mine=NEW/ },
  });
  await write("again.eigentask", "other", basis);
  const both = (await json(1, "add", "two.eigen", "no extension", "again.eigentask"))["error"];
  t.match(both, {
    tag: "task",
    message: /no extension and again.eigentask are both called other; .*--as again.eigentask=NEW/,
  });
  t.match(await json(1, "add", "two.eigen", "again.eigentask", "--as", "nobody=x"), {
    error: { tag: "task", message: /rename nobody to x: no adapter/ },
  });
  const damaged = await readFile(join(folder, "again.eigentask"));
  damaged[damaged.length - 1]! ^= 1;
  await writeFile(join(folder, "damaged.eigentask"), damaged);
  t.match(await json(1, "add", "two.eigen", "damaged.eigentask"), {
    error: { tag: "format", message: /damaged.eigentask.*checksum/ },
  });
  await writeFile(join(folder, "noise.eigentask"), "no task");
  t.match(await json(1, "add", "two.eigen", "noise.eigentask"), {
    error: { tag: "format", message: /noise.eigentask/ },
  });
});

t.test("a full disk leaves the pack as it was, wherever it strikes", async (t) => {
  await json(0, "pack", join(own, "debtags-role"), join(own, "debtags-use"), "-o", "full.eigen", "--k", "8");
  const path = join(folder, "full.eigen");
  const before = await readFile(path);
  const pack = await openPack(before);
  const blob = (await pack.load("debtags-role")).bytes;
  const tasks = ["a", "b", "c"].map((id) => ({ entry: { id, adapterBytes: 0, metadata: {} }, blob }));
  const plan = await layoutAppend(pack, tasks);
  const size = plan.body.reduce((sum, c) => sum + c.length, 0);
  // The disk is a mock, since a real one that fills up needs a mount: it takes `room` bytes, then says ENOSPC.
  let room = 0;
  const files = await t.mockImport<Files>(FILES, {
    "node:fs": {
      ...fs,
      writeSync(file: number, bytes: Uint8Array, start: number, length: number, at: number): number {
        const fits = Math.min(length, room);
        if (fits === 0 && length > 0)
          throw Object.assign(new Error("ENOSPC: no space left on device, write"), { code: "ENOSPC" });
        room -= fits;
        return fs.writeSync(file, bytes, start, fits, at);
      },
    },
  });
  for (let limit = 0; limit < size; limit += Math.ceil(size / 23)) {
    room = limit;
    t.throws(() => files.append(path, plan), { tag: "source", message: /ENOSPC.*as it was before/ });
    t.ok((await readFile(path)).equals(before), `after ${limit} of ${size} bytes`);
    room = limit;
    await t.rejects(files.writeWhole(join(folder, "never.eigen"), plan.body), {
      tag: "source",
      message: /cannot be written/,
    });
  }
  t.notOk(
    (await readdir(folder)).some((n) => n.startsWith("never") || n.endsWith(".lock")),
    "no half-written file",
  );
  room = Infinity;
  files.append(path, plan);
  t.equal((await json(0, "verify", "full.eigen"))["tasks"].length, 5);
});

t.test("fold and export give PEFT's weights back", async (t) => {
  for (const name of ["plain", "modules-to-save", "dora", "conv", "token-rows", "fan-in-fan-out"]) {
    const golden = data(`goldens/peft/${name}`);
    await mkdir(join(folder, name), { recursive: true });
    await cp(join(golden, "adapter"), join(folder, name, "task"), { recursive: true });
    const base = join(golden, "base.safetensors");
    await json(0, ...words`pack ${join(name, "task")} -o one.eigen --force --energy 1 --dtype f32 --base ${base}`);
    const folded = await json(0, "fold", "one.eigen", "--task", "task", "--base", base, "-o", `${name}.safetensors`);
    t.equal(folded["file"], `${name}.safetensors`);
    const merged = await tensorsOf(join(golden, "merged.safetensors"));
    const found = await tensorsOf(join(folder, `${name}.safetensors`));
    for (const [weight, { data, shape }] of merged) {
      t.same(found.get(weight)?.shape, shape, weight);
      t.ok(relativeDifference(found.get(weight)!.data, data) <= 1e-6, `${name}: ${weight}`);
    }
    await json(0, "export", "one.eigen", "--task", "task", "-o", `${name}-back`);
    await json(0, ...words`pack ${name}-back -o two.eigen --force --as ${name}-back=task --energy 1 --dtype f32`);
    await json(0, "fold", "two.eigen", "--task", "task", "--base", base, "-o", "again.safetensors", "--force");
    const again = await tensorsOf(join(folder, "again.safetensors"));
    for (const [weight, { data }] of merged)
      t.ok(relativeDifference(again.get(weight)!.data, data) <= 1e-6, `${name}-back: ${weight}`);
  }
  const other = data("goldens/peft/all-linear/base.safetensors");
  t.match(await json(1, ...words`fold one.eigen --task task --base ${other} -o x`), {
    error: { tag: "base", message: /is not in the base/ },
  });
});

t.test("bad input: what, where, and what to do; exit 1, or 2 for usage", async (t) => {
  await mkdir(join(folder, "empty"), { recursive: true });
  await mkdir(join(folder, "other"), { recursive: true });
  await cp(join(own, "debtags-role"), join(folder, "other", "debtags-role"), { recursive: true });
  await cp(data("goldens/peft/refuse-bin/adapter"), join(folder, "pickle"), { recursive: true });
  await cp(data("goldens/peft/plain/adapter"), join(folder, "tiny"), { recursive: true });
  await writeFile(join(folder, "noise.eigen"), "not a pack at all, but long enough to be read as one?");
  await copyFile(join(folder, "own.eigen"), join(folder, "cut.eigen"));
  await writeFile(join(folder, "cut.eigen"), (await readFile(join(folder, "own.eigen"))).subarray(0, 100_000));
  const failures: [string[], object][] = [
    [["pack", "empty", "-o", "x"], { tag: "adapter" }],
    [["pack", "nowhere", "-o", "x"], { tag: "adapter", message: /nowhere/ }],
    [["pack", own, "other", "-o", "x"], { tag: "task", message: /--as/ }],
    [["pack", "pickle", "-o", "x"], { tag: "adapter", message: /safe_serialization/ }],
    [["pack", "other", "-o", "x", "--base", data("goldens/peft/plain/base.safetensors")], { tag: "base" }],
    [["inspect", "noise.eigen"], { tag: "format", message: /not an EigenLoRA pack/ }],
    [["inspect", "cut.eigen"], { tag: "format", message: /truncated: 100000 bytes of/ }],
    [["inspect", "missing.eigen"], { tag: "source" }],
    [["verify", "own.eigen", "--against", "tiny"], { tag: "task" }],
    [["add", "own.eigen", "tiny", "--any-base"], { tag: "adapter", message: /pack's is|no basis|another base model/ }],
    [["export", "own.eigen", "--task", "debtags-rule", "-o", "x"], { tag: "task", nearest: ["debtags-role"] }],
  ];
  for (const [args, error] of failures) t.match(await json(1, ...args), { error }, args.join(" "));
  const usage: [string[], RegExp][] = [
    [["pack", own, "-o", "x", "--k", "3", "--energy", "0.5"], /exclude each other/],
    [["pack", own, "-o", "x", "--error", "2"], /between 0 and 1/],
    [["pack", own, "-o", "x", "--dtype", "f8"], /f8/],
    [["pack", own, "-o", "x", "--bytes", "1/0"], /expected a size such as 300000, 300kB, 1.5MB or 1\/60/],
    [["export", "own.eigen", "sst2", "-o", "x"], /too many arguments .* A task is named with --task ID/],
    [["view", "own.eigen", "--port", "65536"], /--port 65536: expected a whole number from 0 to 65535/],
  ];
  for (const [args, message] of usage)
    t.match(await json(2, ...args), { error: { tag: "usage", message } }, args.join(" "));

  t.equal(spawned().status, 2);
  t.equal(spawned("--help").status, 0);
  t.match(spawned("--version").stdout, /^\d+\.\d+\.\d+\n$/);
  t.match(spawned("inspect", "missing.eigen"), { status: 1, stdout: "", stderr: /^eigenlora: .*missing.eigen/ });
  for (const args of [["verify", "own.eigen"], ["inspect", "missing.eigen"], ["inspekt"]]) {
    const [alone, here] = [spawned(...args, "--json"), await run(...args, "--json")];
    t.same([alone.status, alone.stderr, JSON.parse(alone.stdout)], [here.status, "", JSON.parse(here.stdout)]);
  }
});
