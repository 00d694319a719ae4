/**
 * `eigenlora/build` without files: it imports nothing of Node, and a page packs adapters to the same bytes.
 */
import { readFile } from "node:fs/promises";
import { buildPack } from "eigenlora/build";
import { readAdapters } from "eigenlora/node";
import t from "tap";
import { answerOf, bundle, noChromium, openPage } from "../support/browser.ts";
import { concat, data } from "../support/packs.ts";

const IDS = ["debtags-role", "sections-0"];
const OPTIONS = { gauge: "balanced", select: { kind: "k", k: 4 }, dtype: { basis: "int8" } } as const;

t.test("a bundle for browsers holds nothing of Node", async (t) => {
  const text = new TextDecoder().decode(await bundle(`export * from "eigenlora/build";`));
  t.notMatch(text, /node:|require\(/);
  t.match(text, /readPeft/);
});

t.test("packing in a page gives the same bytes as in Node", { skip: noChromium }, async (t) => {
  const files = new Map<string, Uint8Array>();
  for (const id of IDS) {
    for (const name of ["adapter_config.json", "adapter_model.safetensors", "task.json"])
      files.set(`${id}/${name}`, await readFile(data(`adapters/own-seed/${id}/${name}`)));
  }
  files.set(
    "page.js",
    await bundle(`
      import { buildPack, readPeft, searchPack } from "eigenlora/build";
      const json = async (path) => (await fetch(path)).json();
      const adapters = await Promise.all(${JSON.stringify(IDS)}.map(async (id) => readPeft({
        id,
        file: id,
        config: await json(id + "/adapter_config.json"),
        tensors: id + "/adapter_model.safetensors",
        task: await json(id + "/task.json"),
      })));
      const { chunks } = await buildPack(adapters, ${JSON.stringify(OPTIONS)});
      const { report } = await searchPack(adapters, { goal: { kind: "bytes", max: 150_000 } });
      globalThis.answer = { bytes: [...new Uint8Array(await new Blob(chunks).arrayBuffer())], found: report.bytes };`),
  );
  const { bytes, found } = (await answerOf(await openPage(t, files))) as { bytes: number[]; found: number };
  const adapters = await readAdapters(IDS.map((id) => data(`adapters/own-seed/${id}`)));
  t.teardown(() => Promise.all(adapters.map((adapter) => adapter.close())));
  const expected = concat((await buildPack(adapters, OPTIONS)).chunks);
  t.ok(expected.every((byte, i) => byte === bytes[i]) && bytes.length === expected.length, `${bytes.length} bytes`);
  t.ok(found > 0 && found <= 150_000, `${found}`);
});
