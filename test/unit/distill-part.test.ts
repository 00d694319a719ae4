/**
 * Distilling on many machines: parts of tasks that `assemble` turns into a pack.
 */
import { readdir, readFile, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { openPack } from "eigenlora";
import t from "tap";
import { json } from "../support/command-line.ts";
import { workIn } from "../support/folder.ts";
import { data } from "../support/packs.ts";
import { tinyLines, tinyModel } from "../support/tiny-model.ts";

t.test("tasks distilled in parts make the pack of one part, byte for byte", async (t) => {
  const folder = workIn(t);
  await writeFile(join(folder, "lines.txt"), tinyLines(60).join("\n"));
  const [a, b, c] = ["three", "five", "two"].map((id) => data(`sessions/adapters/${id}`)) as [string, string, string];
  await json(0, "hub", "shard", a, b, c, "-o", "a.part");
  await json(0, "hub", "merge", "a.part", "--k", "3", "-o", "basis.eigen");
  const asked = [...(await tinyModel()), "--text", "lines.txt"];
  const how = [...asked, "--steps", "30", "--batch", "8", "--dtype", "basis=f16,coefficients=int8,head=f16"];
  const distil = (status: number, ...args: string[]): Promise<Record<string, any>> =>
    json(status, "distill", "basis.eigen", ...args);

  const first = await distil(0, a, ...how, "--part", "-o", "1.part");
  t.match(first, { file: "1.part", adapters: 1, present: false, residual: [{ id: "three", total: Number }] });
  t.match(first.tasks, [{ id: "three", kept: "distilled", added: true, resumed: false }]);
  t.match(await distil(0, a, ...how, "--part", "-o", "1.part"), { present: true }, "it is there already");
  t.match(await distil(2, a, ...how, "--steps", "5", "--part", "-o", "1.part"), {
    error: { tag: "usage", message: /1.part: already exists.*--force/ },
  });
  await distil(0, b, ...how, "--part", "-o", "2.part");
  await distil(0, b, a, ...how, "--part", "-o", "both.part");
  await json(0, "hub", "assemble", "basis.eigen", "2.part", "1.part", "-o", "parts.eigen");
  await json(0, "hub", "assemble", "basis.eigen", "both.part", "-o", "one.eigen");
  t.ok((await readFile(join(folder, "parts.eigen"))).equals(await readFile(join(folder, "one.eigen"))));
  t.notOk(
    (await readdir(folder)).some((name) => /partial|lock/.test(name)),
    "nothing is left beside them",
  );

  const pack = await openPack(join(folder, "one.eigen"));
  t.teardown(() => pack.close());
  const { terms } = await pack.load("three");
  t.same([...new Set(terms.flatMap(({ A, B }) => [A!.tensor.dtype, B!.tensor.dtype]))], ["int8"]);

  t.match(await json(1, "distill", "one.eigen", a, ...how, "--part", "-o", "x.part"), {
    error: { tag: "task", message: /one.eigen has a task "three" already/ },
  });
  t.match(await distil(2, c, ...asked, "--dtype", "int8", "-o", "x.eigen"), {
    error: { tag: "usage", message: /--dtype needs --part/ },
  });
  t.match(await distil(2, c, ...how, "--part", "--key", "key.pem", "-o", "x.part"), {
    error: { tag: "usage", message: /--key and --part exclude each other: parts are not signed/ },
  });
});
