/**
 * Components in a session in the number format of their pack: the same answers as with floats, on every runtime and
 * model; their memory; and layers with one input, which share a product and an input for their cores.
 */
import { readFile } from "node:fs/promises";
import { openPack, type Pack } from "eigenlora";
import type { Adapter } from "eigenlora/build";
import { createSession } from "eigenlora/session";
import t from "tap";
import { adapterOf, linear } from "../support/adapters.ts";
import { modelOf } from "../support/graphs.ts";
import {
  fromBinary,
  makeFloats,
  makeInts,
  makeNode,
  makeValue,
  prepareModel,
  readModel,
  toBinary,
} from "../support/internals/models.ts";
import { packed } from "../support/packs.ts";
import { PlainEngine, PlainTensor } from "../support/plain-engine.ts";
import { soak } from "../support/required.ts";
import {
  difference,
  feeds,
  model,
  NODE,
  ORTS,
  type Ort,
  open,
  outputOf,
  packBytes,
  type Session,
} from "../support/sessions.ts";

/** Tasks with LoRA of different ranks, DoRA, private terms; not lossless: components of three bits cannot be. */
async function packAs(
  adapters: readonly string[],
  base: string,
  basis: "f32" | "f16" | "int8" | "int4" | "int3",
  more: object = {},
): Promise<Pack> {
  const dtype = { basis, coefficients: "f32", head: "f32" } as const;
  return openPack(await packBytes(adapters, base, { select: { kind: "k", k: 6 }, dtype, ...more }));
}

const largest = (values: ArrayLike<number>): number => Array.from(values).reduce((m, v) => Math.max(m, Math.abs(v)), 0);

/** The answers of all tasks, of the base and of one task a row. */
async function answers(session: Session, ort: Pick<Ort, "Tensor">, pack: Pack): Promise<Float32Array[]> {
  const all: Float32Array[] = [];
  const tasks = [...pack.tasks.keys()];
  for (const task of [...tasks, null]) {
    await session.switchTask(task);
    all.push((await outputOf(session, feeds(ort, session))).slice());
  }
  all.push(await outputOf(session, feeds(ort, session), { tasks: [tasks[0]!, null, tasks.at(-1)!] }));
  return all;
}

/** Model, its adapters, its base. "gemm" has rank 2, "branches" nested graphs, "f16" and "q4" other weights. */
const MODELS = [
  ["torchscript", ["adapters"], "base"],
  ["gemm", ["adapters-mlp"], "base-mlp"],
  ["branches", ["adapters-mlp"], "base-mlp"],
  ["f16", ["adapters"], "base"],
  ["q4", ["adapters/two", "adapters/three"], "base"],
  ["int8", ["adapters/two", "adapters/three"], "base"],
] as const;

for (const { name, ort } of ORTS) {
  t.test(`${name}: integers give what floats do`, async (t) => {
    for (const [file, adapters, base] of MODELS) {
      for (const basis of soak || ort === NODE ? (["int8", "int4", "int3", "f16"] as const) : (["int4"] as const)) {
        const pack = await packAs(adapters, base, basis);
        const small = await open(ort, model(file), pack, { mode: "core" });
        const plain = await open(ort, model(file), pack, { mode: "core", components: "f32" });
        t.equal(small.probe.result, "passed", `${file}, ${basis}`);
        const [found, expected] = [await answers(small, ort, pack), await answers(plain, ort, pack)];
        const off = Math.max(...found.map((one, i) => difference(one, expected[i]!) / largest(expected[i]!)));
        // Quantised layers round what enters them: an answer that is off by a last bit can be off by a step.
        t.ok(off < (file === "int8" ? 2e-2 : file === "f16" ? 2e-3 : 3e-6), `${file}, ${basis}: off by ${off}`);
        const bytes = [small.memory().basis, plain.memory().basis] as const;
        // Blocks of 16 are longer than the rows of these models: savings are tested on larger ones.
        if (basis === "f16") t.equal(bytes[0], bytes[1], "floats stay floats");
        else t.ok(bytes[0] < bytes[1], `${file}, ${basis}: ${bytes.join(" of ")}`);
        await small.close();
        await plain.close();
        await pack.close();
      }
    }
  });
}

for (const { name, ort } of ORTS) {
  t.test(`${name}: products with integers round their inputs where all of the model's layers do`, async (t) => {
    const built = fromBinary("ModelProto", await readFile(model("q4")));
    const layers = built.graph!.node.filter(({ opType }) => opType === "MatMulNBits");
    const setLevel = (node: (typeof layers)[number], level: number): void => {
      node.attribute = node.attribute.filter(({ name }) => name !== "accuracy_level");
      node.attribute.push(...makeNode("", "", [], "", { accuracy_level: level }).attribute);
    };
    /** Bits and accuracy levels of the products that a session adds. */
    const added = async (pack: Pack): Promise<Set<string>> => {
      const file = await readModel(toBinary("ModelProto", built));
      const bases = await pack.bases();
      await prepareModel(file, pack, bases.bytes, { mode: "core", integers: ["MatMulNBits", "DequantizeLinear"] });
      bases.close();
      const own = file.model.graph.proto.node.filter(({ name }) => name.startsWith("eigenlora/"));
      const products = own.filter(({ opType }) => opType === "MatMulNBits");
      const numberOf = ({ attribute }: (typeof layers)[number], wanted: string) =>
        Number(attribute.find((a) => a.name === wanted)!.i);
      const unpacked = own.some(({ opType }) => opType === "DequantizeLinear") ? ["unpacked"] : [];
      return new Set([
        ...unpacked,
        ...products.map((one) => `${numberOf(one, "bits")}: ${numberOf(one, "accuracy_level")}`),
      ]);
    };
    for (const [basis, exact, rounded] of [
      ["int4", ["4: 1"], ["4: 4"]],
      // These have so few components that a block of 32 would be padding for the most part, on the side of B.
      ["int8", ["unpacked"], ["unpacked", "8: 4"]],
    ] as const) {
      const pack = await packAs(["adapters/two", "adapters/three"], "base", basis);
      for (const node of layers) setLevel(node, 0);
      t.same(await added(pack), new Set(exact), "the file says nothing");
      for (const node of layers) setLevel(node, 4);
      t.same(await added(pack), new Set(rounded));
      const bytes = toBinary("ModelProto", built);
      const small = await open(ort, bytes, pack, { mode: "core" });
      t.equal(small.probe.result, "passed");
      const plain = await open(ort, bytes, pack, { mode: "core", components: "f32" });
      const [found, expected] = [await answers(small, ort, pack), await answers(plain, ort, pack)];
      const off = Math.max(...found.map((one, i) => difference(one, expected[i]!) / largest(expected[i]!)));
      t.ok(off < 2e-2, `${basis}: off by ${off}, by rounding to 8 bits`);
      await small.close();
      await plain.close();
      setLevel(layers[0]!, 1);
      t.same(await added(pack), new Set(exact), "one layer that does not");
      await pack.close();
    }
  });
}

t.test("by either operator, held against arithmetic in f64", async (t) => {
  for (const basis of ["int8", "int4", "int3"] as const) {
    const pack = await packAs(["adapters/two", "adapters/three"], "base", basis);
    const sessions: Session[] = [];
    for (const integers of [undefined, ["MatMulNBits", "DequantizeLinear"], ["DequantizeLinear"]] as const) {
      const engine = Object.assign(new PlainEngine(), { integers });
      sessions.push((await createSession(engine, model("torchscript"), pack, { mode: "core" })) as unknown as Session);
    }
    const tensors = { Tensor: PlainTensor as unknown as Ort["Tensor"] };
    const [floats, ...small] = await Promise.all(sessions.map((session) => answers(session, tensors, pack)));
    for (const one of small) {
      const off = Math.max(...one.map((values, i) => difference(values, floats![i]!)));
      t.ok(off < 1e-6, `${basis}: off by ${off}`);
    }
    const bytes = sessions.map((session) => session.memory().basis);
    t.ok(bytes[2]! * 3.9 < bytes[0]! + 64, `${basis} as bytes: ${bytes[2]} of ${bytes[0]}`);
    for (const session of sessions) await session.close();
  }
});

/** Two packed layers with one input, as where attention and perceptron lie side by side. The result shows all parts. */
function sideBySide(): Uint8Array {
  const names = ["qkv_proj", "gate_up_proj"];
  const sizes = [PARTS.slice(0, 3), PARTS.slice(3)].map((parts) => parts.map(([, out]) => out));
  const widths = sizes.map((all) => all.reduce((a, b) => a + b, 0));
  const initializer = names.flatMap((name, i) => [
    makeFloats(`layers.0.${name}.weight`, [...wave(WIDTH * widths[i]!, i)], [WIDTH, widths[i]!]),
    makeInts(`${name}/sizes`, sizes[i]!),
  ]);
  const cuts = names.map((name, i) => sizes[i]!.map((_, part) => `${name}/${part}`));
  const node = names.flatMap((name, i) => [
    makeNode("MatMul", `/${name}`, ["x", `layers.0.${name}.weight`], `${name}/whole`),
    makeNode("Split", `/${name}/cut`, [`${name}/whole`, `${name}/sizes`], cuts[i]!, { axis: -1 }),
  ]);
  node.push(makeNode("Concat", "/all", cuts.flat().reverse(), "y", { axis: -1 }));
  const input = [makeValue("x", 1, ["batch", "sequence", WIDTH])];
  const output = [makeValue("y", 1, ["batch", "sequence", widths[0]! + widths[1]!])];
  return modelOf({ node, initializer, input, output });
}

const WIDTH = 8;
const PARTS = [
  ["q_proj", 8],
  ["k_proj", 4],
  ["v_proj", 4],
  ["gate_proj", 6],
  ["up_proj", 6],
] as const;
const wave = (length: number, seed: number): Float32Array =>
  Float32Array.from({ length }, (_, i) => 0.3 * Math.sin(seed + 1.3 * i));

/** @param parts of the model that are adapted */
function adapter(id: string, seed: number, parts: readonly (readonly [string, number])[]): Adapter {
  const modules = parts.map(([part, out], i) => {
    const term = { rank: 2, A: wave(2 * WIDTH, seed + i), Bt: wave(2 * out, 2 * seed + i) };
    return linear(`layers.0.${part}`, out, WIDTH, term);
  });
  return adapterOf(id, modules);
}

t.test("packed layers side by side, all of their parts adapted or some", async (t) => {
  const model = sideBySide();
  const sets = [PARTS, PARTS.slice(0, 3), [PARTS[0], PARTS[2]], [PARTS[4], PARTS[1], PARTS[3]], [...PARTS].reverse()];
  for (const parts of sets) {
    const adapters = [adapter("a", 1, parts), adapter("b", 5, parts.slice(0, 2))];
    const pack = await packed(adapters);
    const x = { x: new NODE.Tensor("float32", wave(2 * 3 * WIDTH, 3), [2, 3, WIDTH]) };
    const what = parts.map(([name]) => name).join(" ");
    const answers = new Map<string, Float32Array[]>();
    for (const mode of ["folded", "core", "factors"] as const) {
      const session = await open(NODE, model, pack, { mode, anyBase: true });
      const found: Float32Array[] = [];
      for (const task of ["a", "b", null]) {
        await session.switchTask(task);
        found.push(await outputOf(session, x));
      }
      answers.set(mode, found);
      for (const [i, values] of found.entries())
        t.ok(difference(values, answers.get("folded")![i]!) < 2e-6, `${what}, ${mode}, ${i}`);
      await session.close();
    }
    const [a, b] = answers.get("folded")!;
    t.ok(difference(a!, b!) > 0.01, "tasks differ");
  }
});
