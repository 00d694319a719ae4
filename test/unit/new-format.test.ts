/**
 * A format that the package does not know, by one entry of its table: files are found, packed, verified, protected,
 * written and listed by the help, and the documentation has a row for each format that it knows.
 */
import { readFileSync, writeFileSync } from "node:fs";
import type { Adapter, AdapterModule, Exportable } from "eigenlora/build";
import t from "tap";
import { fromRoot, workIn } from "../support/folder.ts";
import { FORMATS } from "../support/internals/pack.ts";
import { data } from "../support/packs.ts";

interface Layer {
  readonly A: number[];
  readonly Bt: number[];
}

/** Reads rank-1 updates as JSON: `{ "module": { "A": [in], "Bt": [out] } }`. */
function read({ id, file }: { readonly id: string; readonly file: string }): Adapter {
  const text = readFileSync(file, "utf8");
  const modules = Object.entries(JSON.parse(text) as Record<string, Layer>).map(([name, { A, Bt }]): AdapterModule => {
    const term = { rank: 1, A: Float32Array.from(A), Bt: Float32Array.from(Bt) };
    return { name, out: Bt.length, in: A.length, layout: "out-in", rank: 1, read: async () => term };
  });
  return {
    ...{ id, file, byteLength: text.length, baseModel: undefined, saved: [], metadata: {}, warnings: [] },
    ...{ modules: new Map(modules.map((module) => [module.name, module])), close: async () => {} },
  };
}

async function writeFile({ modules }: Exportable): Promise<Uint8Array[]> {
  const layers: Record<string, Layer> = {};
  for (const [name, module] of modules) {
    const { A, Bt } = await module.read();
    layers[name] = { A: [...A], Bt: [...Bt] };
  }
  return [new TextEncoder().encode(JSON.stringify(layers))];
}

const known = FORMATS.map(({ name }) => name);
// Before the command line looks at the table.
(FORMATS as unknown[]).push({
  ...{ name: "lorajson", ending: ".lorajson", writeFile },
  read: async (files: never) => read(files),
});
const { json, run } = await import("../support/command-line.ts");

t.test("an entry of the table is all that a format needs", async (t) => {
  workIn(t);
  const layer = { A: [1, 0, 2], Bt: [-1, 3] };
  writeFileSync("first.lorajson", JSON.stringify({ "model.layer": layer }));
  const lossless = ["--energy", "1", "--dtype", "f32"];
  t.match(await json(0, "pack", ".", "-o", "p.eigen", ...lossless), { tasks: 1, modules: 1 });
  t.match(await json(0, "verify", "p.eigen", "--against", "first.lorajson"), { ok: true });
  t.match(await json(2, "pack", ".", "-o", "first.lorajson", "--force"), {
    error: { message: /overwrite what it is made/ },
  });
  await json(0, "export", "p.eigen", "--task", "first", "--format", "lorajson", "-o", "again.lorajson");
  const again = JSON.parse(readFileSync("again.lorajson", "utf8"))["model.layer"];
  const products = ({ A, Bt }: Layer): number[] => Bt.flatMap((b) => A.map((a) => a * b));
  for (const [i, value] of products(again).entries()) t.ok(Math.abs(value - products(layer)[i]!) < 1e-6);
  t.match((await run("export", "--help", "--all")).stdout, /, lorajson/);
  writeFileSync("first.lorajson", '{ "model.layer": null }');
  const { stderr } = await run("pack", ".", "-o", "x.eigen");
  t.match(stderr, /eigenlora: TypeError: Cannot .*\n +at (.|\n)*Please report it/);
  t.match((await run("pack", data("onnx"), "-o", "x.eigen")).stderr, /, \.lorajson/);
});

t.test("documentation has a row for each format", async (t) => {
  const rows = readFileSync(fromRoot("docs/adapters.md"), "utf8").split("\n");
  for (const name of known) t.ok(rows.some((row) => row.startsWith("| ") && row.toLowerCase().includes(name)));
});
