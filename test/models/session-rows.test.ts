/**
 * One task per row: right, or refused. The models are one layer whose input has the batch first or not, or holds only
 * some tokens of each row. Expected values are those of each row alone.
 */
import { Tensor } from "onnxruntime-node";
import t, { type Test } from "tap";
import { adapterOf, linear } from "../support/adapters.ts";
import { modelOf } from "../support/graphs.ts";
import { create, makeFloats, makeInts, makeNode, makeValue, type NodeProto } from "../support/internals/models.ts";
import { packed } from "../support/packs.ts";
import { difference, NODE, open, outputOf, refusal, type Session } from "../support/sessions.ts";

const [FLOAT, SIZE] = [1, 8];
const wave = (count: number, seed: number): Float32Array =>
  Float32Array.from({ length: count }, (_, i) => 0.5 * Math.sin(seed + 1.3 * i));

const ADAPTERS = [1, 2].map((seed) => {
  const term = { rank: 2, A: wave(2 * SIZE, seed), Bt: wave(2 * SIZE, 10 * seed) };
  return adapterOf(seed === 1 ? "a" : "b", [linear("mid", SIZE, SIZE, term)]);
});

/** Builds x [batch, tokens, 8] through nodes around the layer, which takes `entering` and gives `made`. */
function layered(before: NodeProto[], entering: string, made: string, after: NodeProto[], tokens: string | number) {
  const layer = makeNode("MatMul", "/mid/MatMul", [entering, "weight"], made);
  const initializer = [
    makeFloats("weight", [...wave(SIZE * SIZE, 3)], [SIZE, SIZE]),
    makeFloats("zero", [0], [1]),
    makeInts("flat", [-1, SIZE]),
    makeInts("fives", [-1, 5, SIZE]),
    makeInts("last", [-1]),
    makeInts("first", [0]),
    makeInts("second", [1]),
  ];
  return modelOf({
    node: [...before, layer, ...after],
    initializer,
    input: [makeValue("x", FLOAT, ["batch", tokens, SIZE])],
    output: [makeValue("y", FLOAT)],
  });
}

/** Reshapes to five tokens, so that made-up inputs do not fit. */
const fives = (value: string, to: string): NodeProto => makeNode("Reshape", to, [value, "fives"], to);
const turn = (value: string, to: string): NodeProto => makeNode("Transpose", to, [value], to, { perm: [1, 0, 2] });
const shape = makeNode("Shape", "shape", ["x"], "shape");

/** Passes only tokens with a positive sum to the layer, one below the other: a router's choice. */
function chosen(from: string, tokens: string | number, more: NodeProto[] = []): Uint8Array {
  return layered(
    [
      shape,
      ...more,
      makeNode("Reshape", "rows", [from, "flat"], "rows"),
      makeNode("ReduceSum", "sums", ["rows", "last"], "sums", { keepdims: 0 }),
      makeNode("Greater", "wanted", ["sums", "zero"], "wanted"),
      makeNode("NonZero", "places", ["wanted"], "places"),
      makeNode("Squeeze", "index", ["places", "first"], "index"),
      makeNode("Gather", "some", ["rows", "index"], "some", { axis: 0 }),
    ],
    "some",
    "made",
    [
      makeNode("Unsqueeze", "at", ["index", "second"], "at"),
      makeNode("ScatterND", "scattered", ["rows", "at", "made"], "scattered"),
      makeNode("Reshape", "y", ["scattered", "shape"], "y"),
    ],
    tokens,
  );
}

/** Rows with varying numbers of positive tokens, or all alike. */
const feed = (rows: number, tokens: number, alike = false): { x: Tensor } => {
  const values = Float32Array.from({ length: rows * tokens * SIZE }, (_, i) => {
    const place = Math.floor(i / SIZE);
    const [row, token] = [alike ? 1 : Math.floor(place / tokens), place % tokens];
    return (token <= row ? 1 : -1) * (0.3 + 0.2 * Math.sin(1.3 * (alike ? i % (tokens * SIZE) : i)));
  });
  return { x: new Tensor("float32", values, [rows, tokens, SIZE]) };
};

const TASKS = ["a", "b", null, "a"] as const;

/** Results of each row alone. */
async function alone(session: Session, { x }: { x: Tensor }): Promise<number[]> {
  const found: number[] = [];
  const width = x.data.length / TASKS.length;
  for (const [row, task] of TASKS.entries()) {
    await session.switchTask(task);
    const one = (x.data as Float32Array).slice(row * width, (row + 1) * width);
    found.push(...(await outputOf(session, { x: new Tensor("float32", one, [1, ...x.dims.slice(1)]) })));
  }
  return found;
}

async function isRight(t: Test, session: Session, own: { x: Tensor }, what: string): Promise<void> {
  const off = difference(await outputOf(session, own, { tasks: TASKS }), await alone(session, own));
  t.ok(off <= 1e-5, `${what}: off by ${off}`);
}

async function isRefused(t: Test, session: Session, own: { x: Tensor }, message: RegExp, what: string): Promise<void> {
  const error = await refusal(() => outputOf(session, own, { tasks: TASKS }));
  t.match(error, { tag: "backend", message }, `${what}: ${error.message}`);
  t.match(error, { message: /; run them one by one$/ });
}

for (const mode of ["core", "factors"] as const) {
  t.test(`${mode}: the batch first`, async (t) => {
    for (const [what, bytes] of [
      ["any number of tokens", layered([], "x", "y", [], "tokens")],
      ["inputs that cannot be made up", layered([fives("x", "five")], "five", "y", [], "tokens")],
    ] as const) {
      const session = await open(NODE, bytes, await packed(ADAPTERS), { mode });
      for (const alike of [true, false]) await isRight(t, session, feed(4, 5, alike), what);
      await session.close();
    }
  });

  t.test(`${mode}: the batch behind the tokens`, async (t) => {
    const after = [turn("turned", "y")];
    for (const [what, bytes] of [
      ["any number of tokens", layered([turn("x", "other")], "other", "turned", after, "tokens")],
      [
        "made-up inputs do not run",
        layered([fives("x", "five"), turn("five", "other")], "other", "turned", after, "tokens"),
      ],
    ] as const) {
      const session = await open(NODE, bytes, await packed(ADAPTERS), { mode });
      await isRefused(t, session, feed(4, 5), /the batch is not the first dimension of some adapted layer/, what);
      t.equal((await alone(session, feed(4, 5))).length, 4 * 5 * SIZE, "one by one it works");
      await session.close();
    }
  });

  t.test(`${mode}: some tokens of each row, as in a mixture of experts`, async (t) => {
    const session = await open(NODE, chosen("x", "tokens"), await packed(ADAPTERS), { mode });
    const message = /mixture of experts/;
    await isRefused(t, session, feed(4, 5), message, "rows that differ");
    await isRefused(t, session, feed(4, 5, true), message, "and equal ones: made-up rows have told");
    await session.close();

    // Inputs that cannot be made up: batches are compared until one has told enough.
    for (const probe of [true, false, feed(2, 5)]) {
      const own = await open(NODE, chosen("five", "tokens", [fives("x", "five")]), await packed(ADAPTERS), {
        mode,
        probe,
      });
      await isRight(t, own, feed(4, 5, true), "equal rows are not mixed");
      await isRefused(t, own, feed(4, 5), message, "rows that differ are");
      await isRight(t, own, feed(4, 5, true), "equal rows still are not");
      await own.close();
    }
  });
}

/** Outputs of the model in 8 bits: enough to tell a task from rounding. */
const WIDE = 96;

/**
 * An adapted layer in front of an 8-bit one that reads all but its first number: that number widens the range that all
 * rows share, so that a task in one row changes the rounding of others.
 * @param swapped whether the sequence comes first inside
 */
function dynamic(swapped: boolean): Uint8Array {
  const weight = Int8Array.from({ length: SIZE * WIDE }, (_, i) =>
    i < WIDE ? 0 : Math.round(90 * Math.sin(1 + 1.9 * i)),
  );
  const raw = (name: string, dataType: number, dims: number[], data: Int8Array | Float32Array) =>
    create("TensorProto", { name, dataType, dims: dims.map(BigInt), rawData: new Uint8Array(data.buffer) });
  const initializer = [
    makeFloats("mid.weight", [...wave(SIZE * SIZE, 3)], [SIZE, SIZE]),
    raw("out.weight_quantized", 3, [SIZE, WIDE], weight),
    raw("out.weight_scale", FLOAT, [], new Float32Array([0.01])),
    raw("out.weight_zero_point", 3, [], new Int8Array(1)),
  ];
  const turn = (from: string, to: string) => makeNode("Transpose", `/turn ${to}`, [from], to, { perm: [1, 0, 2] });
  const [x, y] = swapped ? ["turned", "result"] : ["x", "logits"];
  const node = [
    ...(swapped ? [turn("x", x)] : []),
    makeNode("MatMul", "/mid/MatMul", [x, "mid.weight"], "h"),
    makeNode("DynamicQuantizeLinear", "/quantize", ["h"], ["q", "scale", "zero"]),
    makeNode("MatMulInteger", "/out/MatMul", ["q", "out.weight_quantized", "zero", "out.weight_zero_point"], "sums"),
    makeNode("Cast", "/out/Cast", ["sums"], "floats", { to: FLOAT }),
    makeNode("Mul", "/out/scales", ["scale", "out.weight_scale"], "scales"),
    makeNode("Mul", "/out/Mul", ["floats", "scales"], y),
    ...(swapped ? [turn(y, "logits")] : []),
  ];
  const input = [makeValue("x", FLOAT, ["batch", "sequence", SIZE])];
  const output = [makeValue("logits", FLOAT, ["batch", "sequence", WIDE])];
  return modelOf({ node, initializer, input, output });
}

t.test("rows of 8 bits that share a range: tasks are told from rounding", async (t) => {
  const adapters = ["a", "b"].map((id, i) => {
    const Bt = wave(SIZE, 2 + i);
    Bt[0] = 6;
    return adapterOf(id, [linear("mid", SIZE, SIZE, { rank: 1, A: wave(SIZE, i), Bt })]);
  });
  const pack = await packed(adapters);
  const x = new Tensor("float32", wave(2 * 3 * SIZE, 4), [2, 3, SIZE]);
  const options = { mode: "core", anyBase: true } as const;
  const right = await open(NODE, dynamic(false), pack, options);
  const both = await right.run({ x }, { tasks: ["a", null] });
  t.equal(both["logits"]!.dims.join(), "2,3,96");
  await right.close();
  const swapped = await open(NODE, dynamic(true), pack, options);
  const error = await refusal(() => swapped.run({ x }, { tasks: ["a", null] }));
  t.match(error, { tag: "backend", message: /one task per row: / });
  await swapped.close();
});
