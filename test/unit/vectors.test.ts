import { spawnSync } from "node:child_process";
import { randomInt } from "node:crypto";
import { readdir, readFile } from "node:fs/promises";
import { basename } from "node:path";
import { fileURLToPath } from "node:url";
import {
  createRuntime,
  EigenLoraError,
  type FloatDtype,
  type OpenOptions,
  openPack,
  type Pack,
  type Runtime,
  type Tensor,
  type View,
} from "eigenlora";
import { readTaskFile } from "eigenlora/build";
import t from "tap";
import { run } from "../support/command-line.ts";
import { floats } from "../support/compare.ts";
import { fromRoot } from "../support/folder.ts";
import { decodeTensor, openSafetensors, openSource } from "../support/internals/base.ts";
import { decodeSection, isCoded } from "../support/internals/format.ts";
import { expandTerm } from "../support/internals/pack.ts";
import { Trust } from "../support/internals/runtime.ts";
import { check, meaningsOf, runMutants } from "../support/mutants/run.js";
import { lacking, python, pythonLacks, soak } from "../support/required.ts";
import { repair } from "../vectors/format.js";
import { vectors } from "../vectors/make.js";

interface Vector {
  readonly file: string;
  readonly why: string;
  readonly valid: boolean;
  readonly section?: string;
  readonly values?: string;
  readonly pack?: string;
  /** Where an invalid file fails: opening it, reading a task with its pack, or verifying alone. */
  readonly step?: "open" | "task" | "verify";
  readonly integrity?: string;
  readonly keys?: string[];
  readonly revoked?: string[];
}

const at = (path: string): URL => new URL(`../vectors/${path}`, import.meta.url);
const bytesOf = async (path: string): Promise<Uint8Array> => new Uint8Array(await readFile(at(path)));
const index: Vector[] = JSON.parse(await readFile(at("index.json"), "utf8"));

/** F64 arrays of a safetensors file. */
async function valuesOf(path: string): Promise<Map<string, { shape: readonly number[]; values: Float64Array }>> {
  const source = await openSource(await bytesOf(path));
  const file = await openSafetensors(source);
  const found = new Map<string, { shape: readonly number[]; values: Float64Array }>();
  for (const [name, { shape }] of file.tensors) {
    found.set(name, { shape, values: new Float64Array((await file.read(name)).slice().buffer) });
  }
  return found;
}

function trustOf({ integrity, keys, revoked }: Vector): OpenOptions {
  return {
    ...(integrity === undefined ? {} : { integrity }),
    ...(keys === undefined ? {} : { keys }),
    ...(revoked === undefined ? {} : { revoked }),
  };
}

/** Reason with which a promise is rejected. */
const failure = (work: Promise<unknown>): Promise<unknown> =>
  work.then(
    () => undefined,
    (error: unknown) => error,
  );

/** Opens a vector: a pack with its bases, or a task file by itself with its signature. */
async function open(vector: Vector, options: OpenOptions = trustOf(vector)): Promise<Pack> {
  const bytes = await bytesOf(vector.file);
  const pack = await openPack(vector.pack ? await bytesOf(vector.pack) : bytes, options);
  if (vector.pack) {
    const file = await readTaskFile(bytes);
    await (await Trust.create(vector.file, options)).checkTaskFile(file, vector.file);
  }
  (await pack.bases()).close();
  return pack;
}

/** Reads the tasks of a vector. Task files are added to a pack, under their own ids where these are free. */
async function readTasks(vector: Vector, pack: Pack): Promise<Pack> {
  if (vector.pack) {
    pack.removeTask("whole");
    await pack.addTask("whole", await bytesOf(vector.file));
  }
  for (const id of pack.tasks.keys()) await pack.load(id);
  return pack;
}

t.test("the files are what their script makes", async (t) => {
  const made = vectors();
  const kept = (
    await Promise.all(["valid", "invalid", "apply"].map(async (f) => (await readdir(at(f))).map((n) => `${f}/${n}`)))
  ).flat();
  t.same(new Set([...kept, "index.json", "apply.json"]), new Set(made.keys()));
  for (const [path, bytes] of made) if (!Buffer.from(bytes).equals(await readFile(at(path)))) t.fail(`${path} differs`);
  t.ok(index.filter(({ valid }) => !valid).length >= 260, "at least 260 are invalid");
});

t.test("valid vectors: every value is found, with and without a root and keys", async (t) => {
  for (const vector of index.filter(({ valid }) => valid)) {
    if (!vector.values) {
      await readTasks(vector, await open(vector, trustOf(vector)));
      continue;
    }
    const expected = await valuesOf(vector.values);
    for (const options of [{}, trustOf(vector)]) {
      const pack = await readTasks(vector, await open(vector, options));
      const only = vector.pack ? ["whole"] : [...pack.tasks.keys()];
      const seen = new Set<string>();
      using bases = await pack.bases();
      for (const id of only) {
        const blob = await pack.load(id);
        const values = (name: string): ArrayLike<number> => {
          seen.add(`${id}/${name}`);
          return expected.get(`${id}/${name}`)!.values;
        };
        for (const term of blob.terms) {
          const module = pack.modules[term.module]!;
          const { rank, A, Bt, magnitude } = expandTerm(blob, term, module, bases.bytes);
          const [delta, bound] = [values(`${module.name}/delta`), values(`${module.name}/bound`)];
          let off = 0;
          for (let o = 0; o < module.out; o++) {
            for (let i = 0; i < module.in; i++) {
              let sum = 0;
              for (let k = 0; k < rank; k++) sum += Bt[k * module.out + o]! * A[k * module.in + i]!;
              if (!(Math.abs(sum - delta[o * module.in + i]!) <= bound[o * module.in + i]!)) off++;
            }
          }
          t.equal(off, 0, `${vector.file}: ${id}/${module.name.slice(0, 40)}`);
          if (magnitude) t.same(Array.from(magnitude), Array.from(values(`${module.name}/magnitude`)), "magnitudes");
        }
        for (const { name, shape, tensor } of blob.parameters) {
          const stored = blob.bytes.subarray(tensor.byteOffset, tensor.byteOffset + tensor.byteLength);
          const found = decodeTensor(tensor.dtype, stored, tensor.rows, tensor.width);
          t.same(Array.from(found), Array.from(values(name)), `${vector.file}: ${id}/${name}`);
          t.same(shape, expected.get(`${id}/${name}`)!.shape);
        }
      }
      t.same(
        [...expected.keys()].filter((name) => !seen.has(name)),
        [],
        `${vector.file}: every value was reached`,
      );
    }
  }
});

/** Messages that say more than that a rule is broken. */
const MESSAGES: Readonly<Record<string, RegExp>> = {
  truncated: /truncated/,
  "directory-outside": /outside the file/,
  "directory-in-window": /outside the file/,
  "committed-u64": /2\^53/,
  "too-many-sections": /sections, at most/,
  "section-hole": /starts at/,
  "section-overlap": /starts at/,
  "section-required": /kind \d+/,
  "major-2": /version 2.0.*update/,
  "no-superblock": /neither superblock/,
  nan: /basis A of "types.f32": value 1 of row 0 is NaN or infinite, or 65536 and more/,
};

t.test("invalid vectors are refused by name, at the step that the index says", async (t) => {
  for (const vector of index.filter(({ valid }) => !valid)) {
    const says = `${vector.file} (${vector.section}, ${vector.step}): ${vector.why}`;
    const opened = open(vector);
    const first = await failure(opened);
    const error = first ?? (await failure(opened.then((pack) => readTasks(vector, pack))));
    t.equal(first ? "open" : error ? "task" : "verify", vector.step, says);
    if (!error) continue;
    t.ok(error instanceof EigenLoraError, says);
    t.not((error as { tag?: string }).tag, "source");
    t.match((error as Error).message, MESSAGES[basename(vector.file, ".eigen")] ?? /./, says);
  }
});

t.test("a task that is refused takes no other with it", async (t) => {
  const broken = index.filter(({ step, pack, file }) => step === "task" && !pack && !file.includes("coded"));
  for (const vector of broken) {
    const pack = await open(vector);
    const loaded = await Promise.allSettled([...pack.tasks.keys()].map((id) => pack.load(id)));
    const refused = loaded.filter(({ status }) => status === "rejected").length;
    t.ok(
      refused > 0 && (refused < loaded.length || loaded.length === 1),
      `${vector.file}: ${refused} of ${loaded.length}`,
    );
  }
});

t.test("a task file is held against its pack where it is read with it", async (t) => {
  for (const { file, valid, step, pack, revoked } of index.filter(({ pack }) => pack)) {
    if (revoked || step === "verify") continue;
    const read = async (of: string): Promise<unknown> =>
      readTaskFile(await bytesOf(file), { pack: await openPack(await bytesOf(of)) });
    const trusted = step === "open" && !(await failure(readTaskFile(await bytesOf(file))));
    if (valid || trusted) t.match(await read(pack!), { id: "whole" }, file);
    else t.ok((await failure(read(pack!))) instanceof EigenLoraError, file);
    if (valid)
      await t.rejects(read("valid/sides.eigen"), {
        tag: "task",
        message: /belongs to the basis c9071.*, this pack has c21f5/,
      });
  }
  await t.rejects(readTaskFile(await bytesOf("valid/whole.eigentask"), { packs: "" } as never), { name: "TypeError" });
});

t.test("verify says of each file what SPEC.md says, of a task file with its pack", async (t) => {
  for (const { file, valid, step, integrity, keys, revoked = [], pack, why } of index) {
    // The command line has no empty list of keys.
    if (keys?.length === 0) continue;
    const trust = [
      ...(integrity ? ["--integrity", integrity] : []),
      ...(keys ?? []).flatMap((key) => ["--key", key]),
      ...revoked.flatMap((hash) => ["--revoked", hash]),
    ];
    const verify = async (...more: string[]): Promise<boolean> => {
      const { status, stdout, stderr } = await run("verify", fileURLToPath(at(file)), ...trust, ...more);
      t.notMatch(`${stdout}${stderr}`, /Error:| {4}at |undefined/, file);
      return status === 0;
    };
    t.equal(await verify(...(pack ? ["--pack", fileURLToPath(at(pack))] : [])), valid, `${file}: ${why}`);
    if (pack) t.equal(await verify(), valid || step === "task", `${file} without its pack: ${why}`);
  }
});

/** Tasks on bases by the runtime, SPEC.md, section 6.3: values that its code had no part in. */
interface Application {
  readonly pack: string;
  readonly base: string;
  readonly why: string;
  /** Parameters under each of `tasks`. */
  readonly values?: string;
  readonly tasks?: readonly string[];
  /** Reasons by task. */
  readonly refused?: Readonly<Record<string, string>>;
}

const applications: Application[] = JSON.parse(await readFile(at("apply.json"), "utf8"));

/** Parameters in memory of their own. */
async function baseOf(path: string): Promise<Map<string, Tensor>> {
  const file = await openSafetensors(await openSource(await bytesOf(path)));
  const base = new Map<string, Tensor>();
  for (const [name, { dtype, shape }] of file.tensors)
    base.set(name, { dtype: dtype.toLowerCase() as FloatDtype, shape, data: (await file.read(name)).slice() });
  return base;
}

const viewOf = ({ dtype, shape, data }: Tensor): View => ({
  ...{ dtype, shape, byteOffset: 0 },
  data: new Uint8Array(data.buffer, data.byteOffset, data.byteLength),
});

const bitsOf = (base: ReadonlyMap<string, Tensor>): string[] =>
  [...base].map(([name, { shape, data }]) => {
    return `${name} ${shape}: ${Buffer.from(data.buffer, data.byteOffset, data.byteLength).toString("hex")}`;
  });

for (const backend of ["js", "wasm"] as const) {
  for (const { pack: path, base: basePath, why, values, tasks = [], refused = {} } of applications) {
    t.test(`${backend}: ${why} (${basePath})`, async (t) => {
      const base = await baseOf(basePath);
      const pristine = bitsOf(base);
      const pack = await openPack(await bytesOf(path));
      const expected = values === undefined ? new Map() : await valuesOf(values);
      // Where a module of the pack does not fit, no task is taken.
      let runtime: Runtime | undefined;
      const error = await failure(createRuntime(pack, { base, backend }).then((made) => (runtime = made)));
      t.ok(runtime !== undefined || (error instanceof EigenLoraError && tasks.length === 0), `opens: ${error}`);
      let compared = 0;
      for (const id of tasks) {
        await runtime!.switchTask(id);
        for (const [name, tensor] of base) {
          const { shape, values } = expected.get(`${id}/${name}`)!;
          const bound = expected.get(`${id}/${name}/bound`);
          t.same(tensor.shape, shape, name);
          const found = floats(viewOf(tensor));
          const off = found.findIndex((value, i) => !(Math.abs(value - values[i]!) <= (bound?.values[i] ?? 0)));
          t.equal(
            off,
            -1,
            `${id}: ${name.slice(-40)}[${off}] is ${found[off]}, expected ${values[off]} ± ${bound?.values[off] ?? 0}`,
          );
          compared += bound ? 2 : 1;
        }
      }
      t.equal(compared, expected.size, "every value was reached");
      await runtime?.switchTask(null);
      t.same(bitsOf(base), pristine, "the base, bit for bit");
      for (const [id, why] of runtime ? Object.entries(refused) : []) {
        const error = await failure(runtime!.switchTask(id));
        t.ok(error instanceof EigenLoraError, `${id}: ${why}: ${error}`);
        t.same(bitsOf(base), pristine, "a refused task changes nothing");
      }
      await runtime?.close();
    });
  }
}

const spec = await readFile(fromRoot("SPEC.md"), "utf8");
const [, appendix] = spec.split("## Appendix A");

t.test("the example of SPEC.md is the file, byte for byte", async (t) => {
  const bytes = await bytesOf("valid/minimal.eigen");
  let lines = 0;
  let end = 0;
  for (const [, at, digits] of spec.matchAll(/^(?:([0-9A-F]{4})| {4}) {2}((?:[0-9A-F]{2} )+) /gm)) {
    const expected = Uint8Array.from(digits.trim().split(" "), (byte) => Number.parseInt(byte, 16));
    const start = at === undefined ? end : Number.parseInt(at, 16);
    end = start + expected.length;
    t.same(bytes.subarray(start, end), expected, `bytes from ${start}`);
    lines++;
  }
  t.ok(lines > 35, `${lines} lines`);
});

// Threads for so few numbers would only wait for each other.
const env = { ...process.env, OPENBLAS_NUM_THREADS: "1" };
const noPython = lacking("peft", pythonLacks("numpy"));

t.test("a second reader, in Python and from SPEC.md alone, agrees", { skip: noPython }, (t) => {
  const folder = fileURLToPath(at(""));
  const { status, stdout, stderr } = spawnSync(python, [`${folder}reader.py`, folder], { encoding: "utf8", env });
  t.equal(status, 0, `${stdout}${stderr}`);
  t.match(stdout, /\d\d valid and \d{3} invalid files, \d+ bases: \d+ agree, 0 do not/);
  t.end();
});

t.test("for each rule of that reader, some vector notices when it is off", { skip: noPython }, (t) => {
  const folder = fileURLToPath(at(""));
  const { status, stdout, stderr } = spawnSync(python, ["-W", "ignore", `${folder}reader.py`, folder, "--musts"], {
    ...{ encoding: "utf8", env },
  });
  t.equal(status, 0, `${stdout}${stderr}`);
  t.match(stdout, /1[5-9]\d rules, 0 that no vector notices/);
  t.end();
});

t.test("the decoder of SPEC.md, as it stands there, decodes every coded section", { skip: noPython }, async (t) => {
  const [, code] = /```python\n(.*?)\n```/s.exec(appendix!)!;
  const [, example] = /(43 4F 44 33 .*?)\n```/s.exec(appendix!)!;
  const hex = (bytes: Uint8Array): string => Buffer.from(bytes).toString("hex");
  const stored = example!.replace(/ {3,}[a-zA-Z].*/g, "").replace(/\s/g, "");
  const cases = [[stored, "", "41424344003800000" + "1ff020041424344"]];
  for (const { file } of index.filter(
    ({ file, valid }) => valid && file.includes("coded") && file.endsWith(".eigen"),
  )) {
    const bytes = await bytesOf(file);
    const pack = await openPack(bytes);
    const { sections, basisBytes, bytes: directory } = pack.directory;
    const plain = [(await pack.bases()).bytes];
    for (const id of pack.tasks.keys()) plain.push((await pack.load(id)).bytes);
    const coded = sections
      .filter(({ kind }) => kind !== 3)
      .map(({ coded, offset, length }, i) => {
        return coded ? [hex(bytes.subarray(offset, offset + length)), hex(basisBytes), hex(plain[i]!)] : [];
      });
    cases.push(...coded.filter(({ length }) => length > 0));
    if (isCoded(directory)) cases.push([hex(directory), "", hex(await decodeSection(directory, { file, part: "" }))]);
  }
  t.ok(cases.length > 15, `${cases.length} sections`);
  const main = `
import json, sys
for stored, before, expected in json.load(sys.stdin):
    assert decode(bytes.fromhex(stored), bytes.fromhex(before)).hex() == expected
print("all")
`;
  const { stdout, stderr } = spawnSync(python, ["-c", code + main], { encoding: "utf8", input: JSON.stringify(cases) });
  t.equal(stdout, "all\n", stderr);
});

const COUNT = soak ? 1_000_000 : 500;

t.test(
  `${COUNT} mutants with right checksums: refused by name, or read${noPython ? "" : " as SPEC.md says"}`,
  { timeout: soak ? 7_200_000 : 280_000 },
  async (t) => {
    // Each soak takes other mutants; in 3111386 DoRA's scale is below what f32 holds exactly.
    const first = soak ? randomInt(2 ** 31) : 3_111_000;
    const { refused, folded, wrong } = await runMutants(first, COUNT, !noPython);
    t.same(wrong.slice(0, 5), []);
    t.ok(refused > COUNT / 2 && refused < COUNT, `${refused} were refused`);
    if (!noPython) t.ok(folded > COUNT / 5, `${folded} were folded`);
  },
);

t.test("the comparison of mutants with SPEC.md is not easily content", { skip: noPython }, async (t) => {
  // A byte of a tensor, and it says which weight.
  const bytes = new Uint8Array(await readFile(fromRoot("test/vectors/valid/minimal.eigen")));
  for (const wasm of [false, true]) {
    t.equal(await check({ bytes }, meaningsOf([{ bytes }])[0], wasm), undefined);
    for (const at of [0x782, 0x792, 0x7d6, 0x7da]) {
      const other = bytes.slice();
      other[at]! ^= 1;
      repair(other);
      const said = await check({ bytes }, meaningsOf([{ bytes: other }])[0], wasm);
      t.match(said, /layer\[\d, \d\] is .*expected/, `byte ${at}`);
    }
  }
});
