/**
 * A withdrawn task stays out: one hash, that of its task file or of its place in a pack, refuses it in every form and
 * for every use (SPEC.md, section 8).
 */
import { readFile, writeFile } from "node:fs/promises";
import { openPack, type Pack } from "eigenlora";
import { encodeTaskFile, projectAdapters } from "eigenlora/build";
import { readAdapters } from "eigenlora/node";
import { createTrainer, distill } from "eigenlora/train";
import t from "tap";
import { json, run } from "../support/command-line.ts";
import { workIn } from "../support/folder.ts";
import { integrityOf, isCoded } from "../support/internals/format.ts";
import { parseTaskFile } from "../support/internals/runtime.ts";
import { examples, LABELS } from "../support/learning.ts";
import { data } from "../support/packs.ts";
import { model, NODE, open, packBytes } from "../support/sessions.ts";

workIn(t);

/** A coded pack of two tasks, and a third as an adapter. */
const STEPPED = { select: { kind: "k", k: 3 }, gauge: "balanced", step: 0.02 } as const;
const bytes = await packBytes(["adapters/two", "adapters/three"], "base", STEPPED);
await writeFile("pack.eigen", bytes);
const pack = await openPack(bytes);
const F32 = { basis: "f32", coefficients: "f32", head: "f32" } as const;
const [adapter] = await readAdapters([data("sessions/adapters/five")]);
t.teardown(() => adapter!.close());
const [made] = await projectAdapters(pack, [adapter!], F32, { maxLoss: 1 });
const id = adapter!.id;

/** Files of a task, by form of their blob. */
const FILES = {
  "a coded task": encodeTaskFile(made!.entry, pack.basisId, made!.blob),
  "a task that is not coded": encodeTaskFile(made!.entry, pack.basisId, await plainBlob()),
};

async function plainBlob(): Promise<Uint8Array> {
  const other = await openPack(bytes);
  await other.addTask(id, encodeTaskFile(made!.entry, pack.basisId, made!.blob));
  return (await other.load(id)).bytes;
}

let exports = 0;

/** Every way to use a task, refused or not. */
function ways(hash: string, file: Uint8Array, grown: string): Record<string, () => Promise<unknown>> {
  const withdrawn = async (path: string): Promise<Pack> => openPack(path, { revoked: [hash] });
  const command = async (...args: string[]): Promise<void> => {
    const { status, stdout, stderr } = await run(...args, "--revoked", hash, "--json");
    if (status !== 0) throw new Error(stdout + stderr);
  };
  return {
    load: async () => (await withdrawn(grown)).load(id),
    addTask: async () => (await withdrawn("pack.eigen")).addTask(id, file),
    add: () => command("add", "pack.eigen", "task.eigentask"),
    attach: () => command("attach", model("torchscript"), grown, "-o", "attached.onnx", "--force"),
    export: () => command("export", grown, "--task", id, "-o", `exported/${exports++}`),
    distill: async () => {
      const session = await open(NODE, model("torchscript"), await withdrawn(grown), { trainable: true });
      try {
        return await distill(session, {
          adapter: adapter!,
          feeds: examples(NODE, session, 8, 1).map(({ feeds }) => feeds!),
          steps: 0,
        });
      } finally {
        await session.close();
      }
    },
    compact: () => command("compact", grown),
    verify: () => command("verify", grown),
    switchTask: async () => {
      const session = await open(NODE, model("torchscript"), await withdrawn(grown));
      return session.switchTask(id).finally(() => session.close());
    },
  };
}

for (const [what, file] of Object.entries(FILES)) {
  t.test(`${what}: one hash wherever it lies, and it is refused`, async (t) => {
    await writeFile("task.eigentask", file);
    await writeFile("grown.eigen", bytes);
    await json(0, "add", "grown.eigen", "task.eigentask");
    const { blob } = parseTaskFile(file, "task");
    t.equal(isCoded(blob), what === "a coded task");
    const hash = await integrityOf(blob);
    const grown = await openPack("grown.eigen");
    t.equal(grown.tasks.get(id)!.integrity, hash, "the pack shows the hash of the file's blob");
    const added = await openPack(bytes);
    await added.addTask(id, file);
    t.equal(added.tasks.get(id)!.integrity, hash, "so does one that the task was added to at run time");
    t.same((await json(0, "verify", "task.eigentask")).task, hash, "verify prints it");
    await json(0, "compact", "grown.eigen");
    await json(0, "remove", "grown.eigen", [...pack.tasks.keys()][0]!);
    t.equal((await openPack("grown.eigen")).tasks.get(id)!.integrity, hash, "behind compact and remove");
    const before = await readFile("grown.eigen");
    for (const [way, use] of Object.entries(ways(hash, file, "grown.eigen")))
      await t.rejects(use(), /is revoked \(sha256-/, way);
    t.ok(before.equals(await readFile("grown.eigen")), "nothing was changed");
    t.equal((await openPack("pack.eigen")).tasks.size, 2);
    const other = `sha256-${"A".repeat(43)}=`;
    for (const [way, use] of Object.entries(ways(other, file, "grown.eigen"))) {
      if (["distill", "add"].includes(way)) continue;
      await t.resolves(use(), `${way}, with another hash`);
    }
  });
}

t.test("a task that was learned is coded where its pack is, and keeps its hash", async (t) => {
  const session = await open(NODE, model("torchscript"), await openPack(bytes), { trainable: true });
  const trainer = await createTrainer(session, { labels: LABELS, seed: 3 });
  for await (const _ of trainer.fit(examples(NODE, session, 32, 1), { epochs: 1 }));
  const file = await trainer.task({ id: "mine" });
  const { blob } = parseTaskFile(file, "mine");
  t.ok(isCoded(blob));
  await writeFile("learned.eigen", bytes);
  await writeFile("mine.eigentask", file);
  await json(0, "add", "learned.eigen", "mine.eigentask");
  t.equal((await openPack("learned.eigen")).tasks.get("mine")!.integrity, await integrityOf(blob));
  await session.close();
});
