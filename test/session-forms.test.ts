/**
 * What is no linear layer, in every mode: convolutions, embeddings, normalisations and biases of convolutions of the tiny models in
 * test/data/forms, quantised too, against what PEFT answers.
 */
import { existsSync, readdirSync, readFileSync } from "node:fs";
import t from "tap";
import { readAdapters } from "../dist/src/adapters/folder.js";
import { openHost } from "../dist/src/base/open.js";
import { buildPack } from "../dist/src/pack/build.js";
import { openPack, type Pack } from "../dist/src/pack/pack.js";
import { concat, data, LOSSLESS } from "./packs.ts";
import { difference, type Feeds, MODES, type Mode, ORTS, type Ort, open, outputOf, refusal } from "./sessions.ts";

type Nested = number | readonly Nested[];
const GOLDENS = JSON.parse(readFileSync(data("forms/goldens.json"), "utf8")) as {
  feeds: Record<string, Record<string, Nested>>;
  models: Record<string, string>;
  outputs: Record<string, Record<string, readonly Nested[]>>;
};

const path = (name: string): string => data(`forms/${name}.onnx`);
const flat = (value: Nested): number[] => [value].flat(Infinity as 1) as number[];
const kindOf = (model: string): string => model.split("-")[0]!;
const answer = (answers: string, task: string | null): number[] => flat(GOLDENS.outputs[answers]![task ?? "base"]!);

function dimsOf(value: Nested): number[] {
  return typeof value === "number" ? [] : [value.length, ...dimsOf(value[0]!)];
}

function feedsOf(ort: Pick<Ort, "Tensor">, kind: string): Feeds {
  return Object.fromEntries(
    Object.entries(GOLDENS.feeds[kind]!).map(([name, value]) => {
      const values = flat(value);
      const tensor =
        name === "x"
          ? new ort.Tensor("float32", Float32Array.from(values), dimsOf(value))
          : new ort.Tensor("int64", BigInt64Array.from(values, BigInt), dimsOf(value));
      return [name, tensor];
    }),
  );
}

/** @param folders of adapters under test/data/forms, each one or a folder of some */
async function packOf(kind: string, folders: readonly string[], options = {}): Promise<Pack> {
  const paths = folders.flatMap((folder) => {
    const at = data(`forms/${folder}`);
    return existsSync(`${at}/task.json`) ? [at] : readdirSync(at).map((name) => `${at}/${name}`);
  });
  const adapters = await readAdapters(paths);
  const base = await openHost(data(`forms/${kind}.safetensors`));
  const { chunks } = await buildPack(adapters, { ...LOSSLESS, ...options, base });
  await base.close?.();
  for (const adapter of adapters) await adapter.close();
  return openPack(concat(chunks));
}

const packs = new Map<string, Promise<Pack>>();
function packFor(kind: string): Promise<Pack> {
  const pack = packs.get(kind) ?? packOf(kind, [`adapters-${kind}`]);
  packs.set(kind, pack);
  return pack;
}

const isQuantised = (name: string): boolean => /int8|qdq|qlinear|q4/.test(name);

/** Half-precision arithmetic, and integers that round to a neighbour now and then. */
function tolerance(name: string, mode: Mode): number {
  if (name.endsWith("half")) return mode === "folded" ? 1e-2 : 5e-3;
  return isQuantised(name) ? 2e-2 : 1e-5;
}

for (const { name: runtime, ort } of ORTS) {
  t.test(`models × modes on ${runtime}`, async (t) => {
    t.comment(["model", ...MODES, "rows core", "rows factors"].map((cell) => cell.padEnd(16)).join(""));
    for (const [name, answers] of Object.entries(GOLDENS.models)) {
      const pack = await packFor(kindOf(name));
      const tasks = [null, ...pack.tasks.keys(), null];
      const cells = [name];
      const rows: string[] = [];
      for (const mode of MODES) {
        if (mode === "folded" && isQuantised(name)) {
          const error = await refusal(() => open(ort, path(name), pack, { mode }));
          t.match(error, { tag: "base", message: /quantised.*use mode "core" or "factors"/ }, `${name}, ${mode}`);
          cells.push("refused");
          continue;
        }
        const session = await open(ort, path(name), pack, { mode });
        t.match(session, { mode, unconfirmed: [] }, `${name}, ${mode}`);
        if (mode !== "folded") t.match(session.probe, { result: "passed", difference: Number }, `${name}, ${mode}`);
        const feeds = feedsOf(ort, kindOf(name));
        let [worst, failed] = [0, ""];
        for (const task of tasks) {
          await session.switchTask(task);
          const off = difference(await outputOf(session, feeds), answer(answers, task));
          if (!(off <= tolerance(name, mode))) failed += `${task}: ${off} `;
          worst = Math.max(worst, off);
        }
        t.equal(failed, "", `${name}, ${mode} agrees`);
        cells.push(worst.toExponential(0));
        if (mode !== "folded") {
          const found = await session.run(feeds, { tasks: ["a", null, "b"] });
          const logits = found[session.outputNames[0]!]!;
          const width = logits.dims[1]!;
          const off = Math.max(
            ...["a", null, "b"].map((task, row) => {
              const expected = flat(GOLDENS.outputs[answers]![task ?? "base"]![row]!);
              const own = (logits.data as Float32Array).subarray(row * width, row * width + expected.length);
              return difference(own, expected);
            }),
          );
          // Scales of a whole batch are made of all of its rows.
          const allowed = /int8/.test(name) ? 0.1 : tolerance(name, mode);
          t.ok(off <= allowed, `${name}, ${mode}: one task a row, off by ${off}`);
          rows.push(off.toExponential(0));
        }
        await session.close();
      }
      t.comment([...cells, ...rows].map((cell) => cell.padEnd(16)).join(""));
    }
  });
}
