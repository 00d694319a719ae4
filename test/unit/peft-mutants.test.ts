/**
 * Broken adapter folders, thousands of them by seed: each ends in one of the package's errors naming the folder, or in
 * the values that the definitions give for the files.
 */
import { mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { EigenLoraError, openPack } from "eigenlora";
import { type Adapter, buildPack } from "eigenlora/build";
import { readAdapters } from "eigenlora/node";
import t from "tap";
import { fromRoot } from "../support/folder.ts";
import { elementsOf, uniform } from "../support/internals/base.ts";
import { soak } from "../support/required.ts";

const goldens = fromRoot("test/data/goldens/peft");
const SEEDS = "plain patterns bias-all conv dora embedding lora-bias modules-to-save token-rows rslora".split(" ");
const COUNT = soak ? 4000 : 1000;

type Json = Record<string, unknown>;
interface Header {
  dtype: unknown;
  shape: unknown;
  data_offsets: unknown;
}
/** Files of an adapter, open to changes. A text replaces the JSON it stands for. */
interface Files {
  config: Json | string;
  task: unknown;
  header: [string, Header | unknown][];
  /** Text instead of the header's JSON. */
  headerText: string | undefined;
  data: Uint8Array;
}
type Random = <T>(items: readonly T[]) => T;

function filesOf(name: string): Files {
  const at = (file: string): Uint8Array => new Uint8Array(readFileSync(join(goldens, name, "adapter", file)));
  const bytes = at("adapter_model.safetensors");
  const length = Number(new DataView(bytes.buffer).getBigUint64(0, true));
  const text = new TextDecoder();
  const header = Object.entries(JSON.parse(text.decode(bytes.subarray(8, 8 + length))));
  const config = JSON.parse(text.decode(at("adapter_config.json")));
  return { config, task: undefined, header, headerText: undefined, data: bytes.slice(8 + length) };
}

const deep = (levels: number): unknown => JSON.parse(`${"[".repeat(levels)}${"]".repeat(levels)}`);
const JUNK: readonly unknown[] = [
  ...[null, true, false, 0, -1, 1.5, 4, 1e308, 2 ** 53, "", "x", "../x", "a\u0000b", "__proto__", [], {}, [1], [null]],
  ...[["a"], [-1], [0], { a: 1 }, { "": 1 }, { toString: 1 }, [[1]], [{}], deep(70), "y".repeat(5000)],
];
const PATTERNS =
  "(x+x+)+y .* query (query|value) layer\\.0\\..* [ (?=q)q q{99999} ^bert toString __proto__ .*.*.*.*.*query"
    .split(" ")
    .concat("");
const NAMES = [
  ...[
    "..",
    "../../etc/passwd",
    "/",
    "a\nb",
    "a\u0000",
    "\u001b[31m",
    "__proto__",
    "constructor.lora_A.weight",
    "",
    ".",
  ],
  ...["toString", "hasOwnProperty.weight", ".lora_A.weight", "x.lora_A.weight", "x.lora_B.bias", "n".repeat(5000)],
  ...["é".repeat(600), "base_model.model.__proto__.lora_A.weight", "m.modules_to_save.default.weight", "\ud800"],
];

/** Changes of the configuration. */
const ofConfig: readonly ((config: Json, pick: Random) => void)[] = [
  (config, pick) => void (config[pick(Object.keys(config))] = pick(JUNK)),
  (config, pick) => void delete config[pick(Object.keys(config))],
  (config, pick) =>
    void (config[pick(["rank_pattern", "alpha_pattern"])] = Object.fromEntries([
      [pick(PATTERNS), pick([2, 4, 8, ...JUNK])],
    ])),
  (config, pick) =>
    void (config[pick(["alpha_pattern"])] = Object.fromEntries(
      PATTERNS.filter(() => pick([true, false])).map((pattern) => [pattern, pick([1, 2, 3])]),
    )),
  (config, pick) => void (config[pick(["r", "lora_alpha"])] = pick([1, 2, 3, 4, 8, 65536, 2 ** 31, 1e-320, 1e300])),
  (config, pick) =>
    void (config[pick(["use_rslora", "use_dora", "lora_bias", "fan_in_fan_out"])] = pick([true, false])),
  (config, pick) => void (config[pick(["bias"])] = pick(["none", "all", "lora_only"])),
  (config, pick) =>
    void (config[pick(["modules_to_save"])] = pick([["classifier"], ["query"], ["."], ["bert"], NAMES])),
  (config, pick) =>
    void (config[pick(["trainable_token_indices"])] = pick([
      [0, 1],
      [5, 5],
      { "": [1] },
      { word_embeddings: [2, 1] },
      [2 ** 53],
    ])),
  (config, pick) => void (config[pick(["unknown", ...NAMES])] = pick(JUNK)),
];

/** Changes of the tensors. */
const ofTensors: readonly ((files: Files, pick: Random) => void)[] = [
  ({ header }, pick) => void (pick(header)[0] = pick(NAMES)),
  ({ header }, pick) => void (pick(header)[0] = pick(header)[0]),
  ({ header }, pick) => void header.splice(header.indexOf(pick(header)), 1),
  ({ header }, pick) => void header.push(["__metadata__", pick(JUNK)]),
  ({ header }, pick) => void (pick(header)[1] = pick(JUNK)),
  ({ header }, pick) => {
    const [, tensor] = pick(header);
    Object.assign(tensor as Header, {
      [pick(["dtype", "shape", "data_offsets"])]: pick([
        ...JUNK,
        [2 ** 32, 2 ** 32],
        [0, 0],
        [1, 1],
        "F16",
        "BF16",
        "I32",
        "F4",
      ]),
    });
  },
  ({ header }, pick) => {
    // Other shapes of as many values.
    const tensor = pick(header)[1] as Header;
    const shape = Array.isArray(tensor.shape) ? (tensor.shape as number[]) : [1];
    const size = elementsOf(shape);
    tensor.shape = pick([
      shape.toReversed(),
      [size],
      [1, size],
      [size, 1],
      [1, 1, size],
      [2, size / 2],
      [...shape, 1],
      Array(9).fill(1).with(0, size),
    ]);
  },
  ({ header }, pick) => {
    const name = pick(header);
    name[0] = pick([
      `${name[0]}.default`,
      name[0].replace("base_model.model.", ""),
      name[0].replace("lora_A", "lora_B"),
      name[0].replace("layer.0", "layer.1"),
      name[0].replace(".weight", ".bias"),
    ]);
  },
  ({ data }, pick) => {
    const at = 4 * pick([0, 1, 7, data.length / 4 - 1].map(Math.floor));
    if (at + 4 <= data.length)
      new DataView(data.buffer).setFloat32(at, pick([NaN, Infinity, -Infinity, 3e38, 1e-45]), true);
  },
  (files, pick) =>
    void (files.data = pick([
      files.data.slice(0, pick([0, 1, 100, files.data.length - 1])),
      new Uint8Array([...files.data, 0]),
    ])),
  (files, pick) => {
    const text = JSON.stringify(Object.fromEntries(files.header));
    const at = Math.floor(text.length * pick([0, 0.1, 0.3, 0.5, 0.7, 0.9]));
    files.headerText =
      text.slice(0, at) +
      pick(["", "}", '"', "[", "\\", "\u0000", "1", ":", "9".repeat(400)]) +
      text.slice(at + pick([0, 1, 2]));
  },
];

const ofText: readonly ((files: Files, pick: Random) => void)[] = [
  (files, pick) => {
    const text = JSON.stringify(files.config);
    const at = Math.floor(text.length * pick([0, 0.1, 0.3, 0.5, 0.7, 0.9]));
    files.config =
      text.slice(0, at) + pick(["", "}", '"', "[", "\\", "\u0000", "1", ":", ","]) + text.slice(at + pick([0, 1, 2]));
  },
  (files, pick) =>
    void (files.config = JSON.stringify(files.config).replace(
      "{",
      `{"${pick(["r", "peft_type", "__proto__", "x"])}":4,`,
    )),
  (files, pick) => void (files.config = pick(["", "null", "[]", "5", `"x"`, "{", "\ufeff{}", "[".repeat(10_000)])),
  (files, pick) =>
    void (files.task = pick([
      ...JUNK,
      ...JUNK.map((labels) => ({ labels })),
      ...JUNK.map((license) => ({ license, origin: "x" })),
      { labels: ["a", "b"] },
      { labels: ["a", "b", "c"] },
    ])),
];

function mutant(seed: number): Files {
  const next = uniform(seed);
  const pick: Random = (items) => items[Math.floor(next() * items.length)]!;
  const files = filesOf(pick(SEEDS));
  const changes = pick([1, 1, 1, 2, 3]);
  for (let i = 0; i < changes; i++) {
    const kind = pick(["config", "config", "tensors", "tensors", "text"]);
    if (kind === "text") pick(ofText)(typeof files.config === "string" ? filesOf(pick(SEEDS)) : files, pick);
    else if (kind === "config" && typeof files.config !== "string") pick(ofConfig)(files.config, pick);
    else if (files.header.length > 0 && files.header.every(([, tensor]) => typeof tensor === "object" && tensor))
      pick(ofTensors)(files, pick);
  }
  return files;
}

function write(folder: string, { config, task, header, headerText, data }: Files): void {
  // Written by hand, so that a name may occur twice.
  const text =
    headerText ?? `{${header.map(([name, tensor]) => `${JSON.stringify(name)}:${JSON.stringify(tensor)}`).join()}}`;
  const json = new TextEncoder().encode(text);
  const bytes = new Uint8Array(8 + json.length + data.length);
  new DataView(bytes.buffer).setBigUint64(0, BigInt(json.length), true);
  bytes.set(json, 8);
  bytes.set(data, 8 + json.length);
  rmSync(folder, { recursive: true, force: true });
  mkdirSync(folder);
  writeFileSync(join(folder, "adapter_model.safetensors"), bytes);
  writeFileSync(join(folder, "adapter_config.json"), typeof config === "string" ? config : JSON.stringify(config));
  if (task !== undefined) writeFileSync(join(folder, "task.json"), JSON.stringify(task));
}

/** Values of an F32 tensor of the file. */
function valuesOf({ header, data }: Files, key: string): number[] {
  const { data_offsets } = new Map(header).get(key) as { data_offsets: [number, number] };
  const view = new DataView(data.buffer, data.byteOffset + data_offsets[0], data_offsets[1] - data_offsets[0]);
  return Array.from({ length: view.byteLength / 4 }, (_, i) => view.getFloat32(4 * i, true));
}

/**
 * Compares the linear modules of an adapter with the definitions: A as it is, Bt = scale · Bᵀ.
 * @returns the differences
 */
async function differences(adapter: Adapter, files: Files): Promise<string[]> {
  const found: string[] = [];
  const config = typeof files.config === "string" ? JSON.parse(files.config) : (files.config as Json);
  const number = (field: string, name: string): number | undefined =>
    Object.entries((config[`${field}_pattern`] ?? {}) as Record<string, number>).find(
      ([pattern]) => pattern === name || (!pattern.startsWith("(x") && new RegExp(`^(.*\\.)?(${pattern})$`).test(name)),
    )?.[1];
  for (const { name, rank, out, in: inputs, read } of adapter.modules.values()) {
    const { A, Bt } = await read();
    const place = (side: string): string | undefined =>
      files.header.map(([key]) => key).find((key) => key === `base_model.model.${name}.lora_${side}.weight`);
    const [keyA, keyB] = [place("A"), place("B")];
    if (A.length !== rank * inputs || Bt.length !== rank * out) found.push(`${name}: sizes`);
    const floats = [keyA, keyB].every((key) => key && (new Map(files.header).get(key) as Header).dtype === "F32");
    if (!floats || files.headerText !== undefined) continue;
    const [a, b] = [valuesOf(files, keyA!), valuesOf(files, keyB!)];
    const scale =
      (number("alpha", name) ?? (config["lora_alpha"] as number) ?? 8) /
      (config["use_rslora"] ? Math.sqrt(rank) : rank);
    if (a.some((value, i) => value !== A[i])) found.push(`${name}: A`);
    if (b.some((value, i) => Math.fround(value * scale) !== Bt[(i % rank) * out + Math.floor(i / rank)]))
      found.push(`${name}: B`);
  }
  return found;
}

t.test(`${COUNT} mutants`, async (t) => {
  t.setTimeout(300_000);
  const root = t.testdir();
  const folder = join(root, "mutant");
  const ends = new Map<string, number>();
  const count = (end: string): unknown => ends.set(end, (ends.get(end) ?? 0) + 1);
  for (let seed = 0; seed < COUNT; seed++) {
    const files = mutant(seed);
    write(folder, files);
    try {
      const [adapter] = await readAdapters([folder]);
      const wrong = await differences(adapter!, files);
      for (const { read } of adapter!.saved) await read();
      if (wrong.length > 0) t.fail(`seed ${seed}: ${wrong.join(", ")}`);
      if (seed % 8 === 0) {
        // Adapters that are read can be packed, and written packs open; or a number is too large, which is an
        // AdapterError too.
        const { chunks } = await buildPack([adapter!]);
        const pack = await openPack(new Uint8Array(Buffer.concat(chunks)));
        await pack.load(adapter!.id);
      }
      count(seed % 8 === 0 ? "packed" : "read");
      await adapter!.close();
    } catch (error) {
      const named = error instanceof EigenLoraError && error.message.includes(folder);
      if (!named) t.fail(`seed ${seed}: ${(error as Error).stack}`);
      count((error as EigenLoraError).tag ?? "raw");
    }
  }
  t.comment(Object.fromEntries(ends));
  for (const end of ["read", "packed", "adapter", "format"])
    t.ok((ends.get(end) ?? 0) > COUNT / 100, `${ends.get(end)} ${end}`);
  t.same([...ends.keys()].sort(), ["adapter", "format", "packed", "read"]);
  t.notOk(Object.hasOwn(Object.prototype, "dtype") || "a" in {}, "no prototype is touched");
  t.ok(readdirSync(root).length === 1);
});
