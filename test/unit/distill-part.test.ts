/**
 * Distilling on many machines: parts of tasks that `assemble` turns into a pack, on the real model.
 */
import { readdir, readFile, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { openPack } from "eigenlora";
import t from "tap";
import { readTask } from "../../examples/minilm.js";
import { json } from "../support/command-line.ts";
import { workIn } from "../support/folder.ts";
import { data } from "../support/packs.ts";

t.test("tasks distilled in parts make the pack of one part, byte for byte", async (t) => {
  const folder = workIn(t);
  const own = (id: string): string => data(`adapters/own-seed/${id}`);
  const { train } = await readTask("debtags-role");
  const lines = train.slice(0, 120).map(([text]) => text);
  await writeFile(join(folder, "lines.txt"), lines.join("\n"));
  const [a, b, c] = ["debtags-role", "debtags-use", "debtags-game"].map(own) as [string, string, string];
  await json(0, "hub", "shard", a, b, c, "-o", "a.part");
  await json(0, "hub", "merge", "a.part", "--k", "6", "-o", "basis.eigen");
  const asked = ["--model", data("minilm/model_fp16.onnx"), "--text", "lines.txt", "--tokens", "32"];
  const how = [...asked, "--steps", "8", "--batch", "4", "--dtype", "basis=f16,coefficients=int8,head=f16"];
  const distil = (status: number, ...args: string[]): Promise<Record<string, any>> =>
    json(status, "distill", "basis.eigen", ...args);

  const first = await distil(0, a, ...how, "--part", "-o", "1.part");
  t.match(first, { file: "1.part", adapters: 1, present: false, residual: [{ id: "debtags-role", total: Number }] });
  t.match(first.tasks, [{ id: "debtags-role", kept: "distilled", added: true, resumed: false }]);
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
  const { terms } = await pack.load("debtags-role");
  t.same([...new Set(terms.flatMap(({ A, B }) => [A!.tensor.dtype, B!.tensor.dtype]))], ["int8"]);

  t.match(await json(1, "distill", "one.eigen", a, ...how, "--part", "-o", "x.part"), {
    error: { tag: "task", message: /one.eigen has a task "debtags-role" already/ },
  });
  t.match(await distil(2, c, ...asked, "--dtype", "int8", "-o", "x.eigen"), {
    error: { tag: "usage", message: /--dtype needs --part/ },
  });
  t.match(await distil(2, c, ...how, "--part", "--key", "key.pem", "-o", "x.part"), {
    error: { tag: "usage", message: /--key and --part exclude each other: parts are not signed/ },
  });
});
