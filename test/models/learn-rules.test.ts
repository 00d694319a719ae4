/**
 * Every operator's rule, compared with finite differences of ONNX Runtime's results, on random shapes with
 * broadcasting, free dimensions other than the probed ones, and every opset.
 */
import type { Feed } from "eigenlora/session";
import fc from "fast-check";
import t from "tap";
import { modelOf } from "../support/graphs.ts";
import { elementsOf, uniform } from "../support/internals/base.ts";
import {
  differentiate,
  Emitter,
  flattenScales,
  type ProbedPath,
  Problems,
  probePath,
  RULES,
  unpackProducts,
} from "../support/internals/learn.ts";
import {
  type Attributes,
  create,
  type GraphProto,
  indexGraph,
  type ModelFile,
  makeFloats,
  makeInts,
  makeNode,
  makeValue,
  parseModel,
  type TensorProto,
  toBinary,
} from "../support/internals/models.ts";
import { type Level, probeOf, type Tensors, tensor } from "../support/learning.ts";
import { runs } from "../support/required.ts";
import { NODE } from "../support/sessions.ts";

/** A dimension: fixed, or free by name. */
type Dim = number | "n" | "m";
type Dims = readonly Dim[];
type Sizes = Readonly<Record<"n" | "m", number>>;

/** Free sizes in the two probing feeds; other runs have any. */
const PROBED: readonly Sizes[] = [
  { n: 2, m: 5 },
  { n: 3, m: 7 },
];

interface Input {
  /** Trained values: they are inputs of the graph. */
  readonly dims?: Dims;
  /** Smooth everywhere unless asked for: larger than 0, or apart from each other and from every multiple of 0.2. */
  readonly values?: "positive" | "apart";
  readonly constant?: (name: string) => TensorProto;
  /** A bool input of these dimensions. */
  readonly mask?: Dims;
  /** An int64 scalar input with different values in the two feeds and the run. */
  readonly index?: { readonly rank: 0 | 1; readonly value: (sizes: Sizes) => number };
  /** The input is left out. */
  readonly absent?: true;
}

/** One node. */
interface Case {
  readonly opset: number;
  readonly inputs: readonly Input[];
  readonly attributes?: Attributes;
  /** Strings as attributes. */
  readonly text?: Readonly<Record<string, string>>;
  readonly outputs?: number;
  /** Indices of the outputs that are used. */
  readonly used?: readonly number[];
  /** True if onnxruntime's own operator unpacks blocks of integers. */
  readonly gathers?: boolean;
  /** True if weights in blocks are unpacked without the free dimensions. */
  readonly untold?: boolean;
}

const opset = (least = 13): fc.Arbitrary<number> => fc.integer({ min: least, max: Math.max(21, least) });
const dim: fc.Arbitrary<Dim> = fc.constantFrom<Dim>(1, 2, 3, "n", "m");
const shape = (least: number, most: number): fc.Arbitrary<Dim[]> =>
  fc.array(dim, { minLength: least, maxLength: most });

/** Shapes that broadcast to `to`. */
function broadcast(to: Dims): fc.Arbitrary<Dim[]> {
  return fc
    .tuple(fc.nat({ max: to.length }), fc.array(fc.boolean(), { minLength: to.length, maxLength: to.length }))
    .map(([cut, ones]) => to.map((d, i) => (ones[i] ? 1 : d)).slice(cut));
}

function elementwise(
  inputs: number,
  values?: Input["values"],
  fixed: Partial<Case> = {},
  least = 13,
): fc.Arbitrary<Case> {
  if (inputs === 1)
    return fc
      .record({ opset: opset(least), dims: shape(0, 4) })
      .map(({ opset, dims }) => ({ opset, inputs: [{ dims, values }], ...fixed }));
  return shape(1, 4).chain((to) =>
    fc.tuple(opset(least), ...Array.from({ length: inputs }, () => broadcast(to))).map(([opset, ...all]) => ({
      opset,
      inputs: (all as Dim[][]).map((dims) => ({ dims, values })),
      ...fixed,
    })),
  );
}

/** An axis of a shape, counted from either end. */
const axisOf = (rank: number): fc.Arbitrary<number> => fc.integer({ min: -rank, max: rank - 1 });
const from = (axis: number, rank: number): number => (axis < 0 ? axis + rank : axis);
const ints =
  (values: readonly number[], scalar = false) =>
  (name: string): TensorProto =>
    makeInts(name, values, scalar ? [] : undefined);
const floats =
  (values: readonly number[], dims: readonly number[]) =>
  (name: string): TensorProto =>
    makeFloats(name, values, dims);

function alongAxis(of: { values?: Input["values"]; least?: number } = {}): fc.Arbitrary<Case> {
  return shape(1, 4).chain((dims) =>
    fc
      .tuple(opset(of.least), axisOf(dims.length))
      .map(([opset, axis]) => ({ opset, inputs: [{ dims, values: of.values }], attributes: { axis } })),
  );
}

/** Weight and bias over the last dimensions, fixed ones. */
function normalization(least: number, biased: boolean): fc.Arbitrary<Case> {
  return fc
    .tuple(
      opset(least),
      shape(0, 2),
      fc.array(fc.integer({ min: 3, max: 4 }), { minLength: 1, maxLength: 2 }),
      fc.boolean(),
      fc.boolean(),
    )
    .map(([opset, leading, last, bias, fromEnd]) => ({
      opset,
      inputs: [{ dims: [...leading, ...last] }, { dims: last }, ...(bias && biased ? [{ dims: last }] : [])],
      // Large, so that the curvature of rows with nearly equal values stays within reach of finite differences.
      attributes: { axis: fromEnd ? -last.length : leading.length, epsilon: { float: 0.25 } },
    }));
}

function reduction(op: "ReduceSum" | "ReduceMean" | "ReduceMax"): fc.Arbitrary<Case> {
  return shape(1, 4).chain((dims) =>
    fc
      .tuple(
        opset(),
        fc.uniqueArray(fc.nat({ max: dims.length - 1 }), { maxLength: dims.length }),
        fc.constantFrom(0, 1, undefined),
        fc.boolean(),
        fc.boolean(),
      )
      .map(([opset, places, keepdims, fromEnd, noop]) => {
        const axes = places.map((axis) => (fromEnd ? axis - dims.length : axis));
        const asInput = op === "ReduceSum" || opset >= 18;
        const values = op === "ReduceMax" ? ("apart" as const) : undefined;
        return {
          opset,
          inputs: [{ dims, values }, ...(asInput && axes.length > 0 ? [{ constant: ints(axes) }] : [])],
          attributes: {
            ...(keepdims === undefined ? {} : { keepdims }),
            ...(!asInput && axes.length > 0 ? { axes } : {}),
            ...(asInput && noop ? { noop_with_empty_axes: 1 } : {}),
          },
        };
      }),
  );
}

const matMul: fc.Arbitrary<Case> = fc.oneof(
  // Matrices with a batch each, vectors among them.
  fc
    .tuple(opset(), shape(1, 4), dim, fc.constantFrom(0, 1, 2), fc.constantFrom<Dim>(2, 3, "m"))
    .chain(([opset, to, inner, vectors, last]) =>
      fc.tuple(broadcast(to.slice(0, -1)), broadcast(to.slice(0, -1))).map(([a, b]) => {
        const rows = to.at(-1)!;
        const left: Dims = vectors === 1 ? [inner] : [...a, rows, inner];
        const right: Dims = vectors === 2 ? [inner] : [...b, inner, last];
        return { opset, inputs: [{ dims: left }, { dims: right }] };
      }),
    ),
  // Any rows by one matrix, as in a linear layer.
  fc
    .tuple(opset(), shape(1, 3), fc.constantFrom(2, 3), fc.constantFrom<Dim>(1, 4, "m"))
    .map(([opset, leading, inner, last]) => ({
      opset,
      inputs: [{ dims: [...leading, inner] }, { dims: [inner, last] }],
    })),
);

const gemm: fc.Arbitrary<Case> = fc
  .tuple(
    opset(),
    fc.boolean(),
    fc.boolean(),
    fc.tuple(dim, dim, dim),
    fc.constantFrom(1, 0.5),
    fc.constantFrom(1, -2),
    fc.constantFrom(-1, 0, 1, 2, 3),
  )
  .map(([opset, transA, transB, [m, k, n], alpha, beta, bias]) => {
    const C = bias < 0 ? undefined : [[], [n], [1, n], [m, n]][bias];
    return {
      opset,
      inputs: [{ dims: transA ? [k, m] : [m, k] }, { dims: transB ? [n, k] : [k, n] }, ...(C ? [{ dims: C }] : [])],
      attributes: { transA: Number(transA), transB: Number(transB), alpha: { float: alpha }, beta: { float: beta } },
    };
  });

/** Slices with ends that only the run tells. */
const freeSlice: fc.Arbitrary<Case> = fc
  .tuple(opset(), fc.constantFrom<Dim>(4, "n"), fc.nat({ max: 2 }), fc.constantFrom(0, 1))
  .map(([opset, size, at, cut]) => ({
    opset,
    inputs: [
      { dims: (["m", 2] as Dim[]).toSpliced(at, 0, size) },
      { index: { rank: 1, value: () => 1 - 2 * cut } },
      { index: { rank: 1, value: (sizes) => (typeof size === "number" ? size : sizes[size]) - 1 + 100 * cut } },
      { constant: ints([at]) },
    ],
  }));

const slice: fc.Arbitrary<Case> = fc
  .array(fc.constantFrom<Dim>(3, 4, "n", "m"), { minLength: 1, maxLength: 3 })
  .chain((dims) =>
    fc
      .tuple(
        ...([
          opset(),
          fc.uniqueArray(fc.nat({ max: dims.length - 1 }), { minLength: 1, maxLength: dims.length }),
          fc.boolean(),
        ] as const),
        // Dimensions are 3 or more, and at least one element of each is left.
        fc.array(fc.constantFrom([0, 1], [0, 2], [1, 3], [-2, -1], [-3, 1000], [1, -1], [0, 1000], [-1, 2 ** 31]), {
          minLength: 3,
          maxLength: 3,
        }),
        fc.boolean(),
      )
      .map(([opset, places, fromEnd, cuts, step]) => {
        const axes = places.map((axis) => (fromEnd ? axis - dims.length : axis));
        const part = (which: 0 | 1): number[] => places.map((axis) => cuts[axis]![which]!);
        const implied = places.length === dims.length && places.every((axis, i) => axis === i) && !fromEnd && !step;
        return {
          opset,
          inputs: [
            ...[{ dims }, { constant: ints(part(0)) }, { constant: ints(part(1)) }],
            ...(implied ? [] : [{ constant: ints(axes) }]),
            ...(step ? [{ constant: ints(axes.map(() => 1)) }] : []),
          ],
        };
      }),
  );

const gather: fc.Arbitrary<Case> = shape(1, 4).chain((dims) =>
  fc
    .tuple(opset(), axisOf(dims.length), fc.constantFrom(0, 1, 2), fc.constantFrom("first", "last", "free"))
    .map(([opset, axis, rank, which]) => {
      const attributes = { axis };
      const x = { dims };
      if (which === "free" && rank < 2) {
        const size = dims[from(axis, dims.length)]!;
        const value = (sizes: Sizes): number => (typeof size === "number" ? size : sizes[size]) - 1;
        return { opset, attributes, inputs: [x, { index: { rank: rank as 0 | 1, value } }] };
      }
      const at = which === "first" ? 0 : -1;
      return {
        opset,
        attributes,
        inputs: [x, { constant: (name: string): TensorProto => makeInts(name, [at], Array(rank).fill(1)) }],
      };
    }),
);

/** Rows of a matrix, some of them more than once. */
const gatherRows: fc.Arbitrary<Case> = fc
  .tuple(opset(), dim, fc.array(fc.integer({ min: -3, max: 2 }), { minLength: 1, maxLength: 5 }))
  .map(([opset, width, rows]) => ({
    ...{ opset, attributes: { axis: 0 } },
    inputs: [{ dims: [3, width] }, { constant: (name: string): TensorProto => makeInts(name, rows) }],
  }));

const split: fc.Arbitrary<Case> = fc
  .tuple(
    opset(),
    shape(1, 2),
    fc.constantFrom(0, 1),
    fc.array(fc.integer({ min: 1, max: 2 }), { minLength: 2, maxLength: 9 }),
    fc.boolean(),
  )
  .map(([opset, others, at, pieces, some]) => {
    const dims = [...others.slice(0, at), pieces.reduce((a, b) => a + b, 0), ...others.slice(at)];
    const used = some ? [0] : pieces.map((_, i) => i);
    return {
      opset,
      inputs: [{ dims }, { constant: ints(pieces) }],
      attributes: { axis: at },
      outputs: pieces.length,
      used,
    };
  });

const concat: fc.Arbitrary<Case> = shape(1, 3).chain((dims) =>
  fc.tuple(opset(), axisOf(dims.length), fc.array(dim, { minLength: 1, maxLength: 8 })).map(([opset, axis, sizes]) => ({
    opset,
    inputs: sizes.map((size) => ({ dims: dims.with(from(axis, dims.length), size) })),
    attributes: { axis },
  })),
);

const bytes =
  (seed: number, ...dims: number[]) =>
  (name: string): TensorProto => {
    const next = uniform(seed);
    const rawData = Uint8Array.from({ length: elementsOf(dims) }, () => 256 * next());
    return create("TensorProto", { name, dataType: 2, dims: dims.map(BigInt), rawData });
  };

/** Weights in blocks: of 4 or 8 bits, with and without zeros, rows that do not fill their blocks, a bias. */
const blocks: fc.Arbitrary<Case> = fc
  .record({
    opset: opset(),
    leading: shape(1, 2),
    bits: fc.constantFrom(4, 8),
    K: fc.constantFrom(32, 40, 48),
    // A row count of 40 gives so many zeros that only their shape is looked at.
    N: fc.constantFrom(5, 40),
    zeros: fc.constantFrom("none", "bytes"),
    bias: fc.boolean(),
    flat: fc.boolean(),
    gathers: fc.boolean(),
    untold: fc.boolean(),
    seed: fc.nat({ max: 99 }),
  })
  .map(({ opset, leading, bits, K, N, zeros, bias, flat, gathers, untold, seed }) => {
    const block = 16;
    const many = Math.ceil(K / block);
    const next = uniform(seed);
    const some = (from: number, by: number, length: number): number[] =>
      Array.from({ length }, () => from + by * next());
    const zero: Record<string, Input> = {
      none: { absent: true },
      bytes: { constant: bytes(seed + 1, N * Math.ceil((many * bits) / 8)) },
    };
    const inputs: Input[] = [
      { dims: [...leading, K] },
      { constant: bytes(seed, N, many, (block * bits) / 8) },
      { constant: floats(some(0.02, 0.02, N * many), flat ? [N * many] : [N, many]) },
      zero[zeros]!,
      ...(bias ? [{ absent: true as const }, { constant: floats(some(0, 1, N), [N]) }] : []),
    ];
    return { opset, gathers, untold, inputs, attributes: { K, N, bits, block_size: block } };
  });

const CASES: Record<string, fc.Arbitrary<Case>> = {
  ...Object.fromEntries(
    ["Identity", "Neg", "Erf", "Tanh", "Sigmoid", "Softplus", "Exp"].map((op) => [op, elementwise(1)]),
  ),
  ...Object.fromEntries(["Reciprocal", "Sqrt", "Log"].map((op) => [op, elementwise(1, "positive")])),
  Cast: elementwise(1, undefined, { attributes: { to: 1 } }),
  Dropout: elementwise(1),
  Relu: elementwise(1, "apart"),
  Clip: fc.tuple(opset(), shape(0, 4)).map(([opset, dims]) => ({
    opset,
    inputs: [{ dims, values: "apart" as const }, { constant: floats([-0.6], []) }, { constant: floats([0.8], []) }],
  })),
  Gelu: fc.oneof(elementwise(1, undefined, {}, 20), elementwise(1, undefined, { text: { approximate: "tanh" } }, 20)),
  Add: elementwise(2),
  Sub: elementwise(2),
  Mul: elementwise(2),
  Sum: fc.integer({ min: 2, max: 4 }).chain((many) => elementwise(many)),
  Div: elementwise(2, "positive"),
  Pow: fc
    .tuple(opset(), shape(0, 3), fc.constantFrom(2, 3, 0.5, 1, -1, 1.7))
    .chain(([opset, dims, e]) =>
      fc
        .constantFrom<Case["inputs"]>(
          [{ dims, values: "positive" }, { constant: floats([e], []) }],
          [{ dims, values: "positive" }, { constant: floats([e], [1, 1]) }],
          [{ dims: [...dims, 3], values: "positive" }, { constant: floats([e, 2, 0.3], [3]) }],
          [{ dims: [...dims, 1], values: "positive" }, { constant: floats([e, 2, 0.3], [3]) }],
        )
        .map((inputs) => ({ opset, inputs })),
    ),
  Where: shape(1, 4).chain((to) =>
    fc
      .tuple(opset(), broadcast(to), broadcast(to), broadcast(to))
      .map(([opset, mask, a, b]) => ({ opset, inputs: [{ mask }, { dims: a }, { dims: b }] })),
  ),
  MatMul: matMul,
  Gemm: gemm,
  Softmax: alongAxis(),
  LogSoftmax: alongAxis(),
  LayerNormalization: normalization(17, true),
  RMSNormalization: normalization(23, false),
  SimplifiedLayerNormalization: normalization(13, false).map((one) => ({
    ...one,
    attributes: { ...one.attributes, axis: -1 },
    inputs: [{ dims: [...one.inputs[0]!.dims!.slice(0, -1), 3] }, { dims: [3] }],
  })),
  "com.microsoft.Gelu": elementwise(1).filter(({ inputs }) => inputs[0]!.dims!.length > 0),
  "com.microsoft.FastGelu": elementwise(1).filter(({ inputs }) => inputs[0]!.dims!.length > 0),
  "com.microsoft.MatMulNBits": blocks,
  ReduceSum: reduction("ReduceSum"),
  ReduceMean: reduction("ReduceMean"),
  ReduceMax: reduction("ReduceMax"),
  Reshape: fc
    .tuple(opset(), fc.constantFrom<Dim>("n", "m", 3))
    .map(([opset, first]) => ({ opset, inputs: [{ dims: [first, 6] }, { constant: ints([-1, 2, 3]) }] })),
  Flatten: shape(1, 4).chain((dims) =>
    fc
      .tuple(opset(), fc.nat({ max: dims.length }))
      .map(([opset, axis]) => ({ opset, inputs: [{ dims }], attributes: { axis } })),
  ),
  Squeeze: fc.tuple(opset(), fc.nat({ max: 2 }), fc.boolean()).map(([opset, at, fromEnd]) => ({
    opset,
    inputs: [{ dims: (["n", 3] as Dim[]).toSpliced(at, 0, 1) }, { constant: ints([fromEnd ? at - 3 : at]) }],
  })),
  Unsqueeze: fc
    .tuple(opset(), shape(0, 3), fc.nat({ max: 3 }))
    .map(([opset, dims, at]) => ({ opset, inputs: [{ dims }, { constant: ints([Math.min(at, dims.length)]) }] })),
  Transpose: shape(1, 4).chain((dims) =>
    fc
      .tuple(opset(), fc.shuffledSubarray([...dims.keys()], { minLength: dims.length }), fc.boolean())
      .map(([opset, perm, given]) => ({
        opset,
        inputs: [{ dims }],
        attributes: (given ? { perm } : {}) as Attributes,
      })),
  ),
  Expand: fc.tuple(opset(), fc.array(fc.constantFrom<Dim>(1, 2, "n"), { maxLength: 3 })).map(([opset, dims]) => ({
    opset,
    // A size of 1 leaves a dimension as it is.
    inputs: [{ dims }, { constant: ints([2, ...dims.map((d) => (d === 1 ? 3 : 1))]) }],
  })),
  Concat: concat,
  Split: split,
  Gather: fc.oneof(gather, gatherRows),
  Slice: fc.oneof(slice, freeSlice),
};

const sizeOf = (dims: Dims, sizes: Sizes): number[] => dims.map((d) => (typeof d === "number" ? d : sizes[d]));

function valuesOf(kind: Input["values"], many: number, next: () => number): Float32Array {
  if (kind === "positive") return Float32Array.from({ length: many }, () => 0.6 + next());
  if (kind !== "apart") return Float32Array.from({ length: many }, () => 3 * next() - 1.5);
  const order = Array.from({ length: many }, (_, i) => [next(), 0.2 * (i - Math.floor(many / 2)) + 0.1] as const);
  return Float32Array.from(
    order.sort(([a], [b]) => a - b),
    ([, value]) => value,
  );
}

function feedsOf({ inputs }: Case, sizes: Sizes, next: () => number): Map<string, Feed> {
  const feeds = new Map<string, Feed>();
  for (const [i, { dims, values, mask, index }] of inputs.entries()) {
    if (dims) {
      const size = sizeOf(dims, sizes);
      feeds.set(`x${i}`, { dataType: 1, dims: size, data: valuesOf(values, elementsOf(size), next) });
    } else if (mask) {
      const size = sizeOf(mask, sizes);
      feeds.set(`x${i}`, {
        dataType: 9,
        dims: size,
        data: Uint8Array.from({ length: elementsOf(size) }, () => Number(next() < 0.5)),
      });
    } else if (index) {
      feeds.set(`x${i}`, {
        dataType: 7,
        dims: index.rank === 0 ? [] : [1],
        data: BigInt64Array.of(BigInt(index.value(sizes))),
      });
    }
  }
  return feeds;
}

/** A model of one node, without and with the gradients of its inputs for a gradient fed as `seed`. */
async function differentiated(
  op: string,
  { inputs, attributes = {}, text = {}, outputs = 1, used = [0], opset, gathers = false, untold = false }: Case,
  feeds: readonly Map<string, Feed>[],
): Promise<[forward: Uint8Array, both: Uint8Array]> {
  const [opType, domain] = op.startsWith("com.") ? [op.split(".").at(-1)!, "com.microsoft"] : [op, ""];
  const node = makeNode(
    opType,
    op,
    inputs.map(({ absent }, i) => (absent ? "" : `x${i}`)),
    Array.from({ length: outputs }, (_, i) => `y${i}`),
    attributes,
    domain,
  );
  for (const [name, value] of Object.entries(text))
    node.attribute.push(create("AttributeProto", { name, s: new TextEncoder().encode(value), type: 3 }));
  const graph = create("GraphProto", { name: "one" });
  // All used outputs concatenated in one row.
  const rows = used.map((i) => makeNode("Flatten", `flat${i}`, [`y${i}`], `flat${i}`, { axis: 0 }));
  const whole = makeNode(
    "Concat",
    "whole",
    used.map((i) => `flat${i}`),
    "whole",
    { axis: 1 },
  );
  graph.node.push(node, ...rows, whole);
  for (const [i, { dims, constant, mask, index, absent }] of inputs.entries()) {
    if (absent) continue;
    if (constant) graph.initializer.push(constant(`x${i}`));
    else
      graph.input.push(
        makeValue(`x${i}`, dims ? 1 : mask ? 9 : 7, index ? (index.rank === 0 ? [] : [1]) : (dims ?? mask)!),
      );
  }
  const sources = inputs.flatMap(({ dims }, i) => (dims ? [`x${i}`] : []));
  const { forward, both } = await derive(op, graph, opset, sources, feeds, { gathers, untold });
  return [forward, both];
}

/**
 * A model without and with the gradients of inputs, from a fed gradient of the value `whole`. Weights in blocks are
 * unpacked in the latter.
 */
async function derive(
  name: string,
  graph: GraphProto,
  opset: number,
  sources: readonly string[],
  feeds: readonly Map<string, Feed>[],
  { gathers = false, untold = false } = {},
): Promise<{ forward: Uint8Array; both: Uint8Array; path: ProbedPath }> {
  graph.output.push(makeValue("whole", 1));
  const forward = modelOf(graph, { opset });
  const model = parseModel(forward, name);
  const main = model.graph.proto;
  const file: ModelFile = {
    model: { ...model, graph: indexGraph(main, name) },
    bytes: forward,
    folder: undefined,
    external: undefined,
    close: async () => undefined,
  };
  if (!gathers) flattenScales(file.model.graph);
  const emit = new Emitter(main, opset);
  emit.gathers = gathers;
  const problems = new Problems();
  const path = await probePath(file, sources, "whole", problems, probeOf(NODE), feeds);
  const gradients = differentiate(path, "whole", () => "seed", emit, problems);
  problems.throwIfAny(name);
  main.node.push(...emit.shapes, ...emit.nodes);
  main.input.push(makeValue("seed", 1, ["", ""]));
  for (const source of sources) {
    main.node.push(makeNode("Identity", `d${source}`, [gradients.get(source)!], `d${source}`));
    main.output.push(makeValue(`d${source}`, 1));
  }
  if (!gathers)
    unpackProducts(indexGraph(main, name), opset, (value) => (untold ? undefined : path.shapes.rank(value)));
  return { forward, both: toBinary("ModelProto", file.model.proto), path };
}

/** Step of the finite differences. Values are apart by more than twice that. */
const STEP = 0.04;
const TOLERANCE = 5e-4;

t.test("every rule has a case", async (t) => {
  t.same(Object.keys(CASES).sort(), [...RULES.keys()].sort());
});

for (const [op, cases] of Object.entries(CASES)) {
  t.test(`${op} against finite differences`, async (t) => {
    let worst = 0;
    const sizes = fc.record({ n: fc.integer({ min: 1, max: 4 }), m: fc.integer({ min: 1, max: 4 }) });
    const least = op === "Slice" ? 3 : 1;
    const property = fc.asyncProperty(
      cases,
      sizes,
      fc.integer(),
      fc.constantFrom<Level>("disabled", "all"),
      async (one, other, seed, level) => {
        const next = uniform(seed);
        const run = { n: Math.max(least, other.n), m: Math.max(least, other.m) };
        const probed =
          least === 3
            ? [
                { n: 5, m: 8 },
                { n: 6, m: 9 },
              ]
            : PROBED;
        const [forward, both] = await differentiated(
          op,
          one,
          probed.map((sizes) => feedsOf(one, sizes, next)),
        );
        const session = await NODE.InferenceSession.create(forward, { graphOptimizationLevel: level });
        // Sessions that learn are loaded with this option.
        const extra = { session: { disable_prepacking: "1" } };
        const gradients = await NODE.InferenceSession.create(both, { graphOptimizationLevel: level, extra });
        try {
          const given = feedsOf(one, run, next);
          const feeds: Tensors = {};
          for (const [name, feed] of given) feeds[name] = tensor(NODE, feed);
          const outputs = async (): Promise<Float32Array> => (await session.run(feeds))["whole"]!.data as Float32Array;
          const weights = Float32Array.from(await outputs(), () => 2 * next() - 1);
          const answers = await outputs();
          const loss = async (): Promise<number> =>
            (await outputs()).reduce((sum, value, i) => sum + value * weights[i]!, 0);
          const results = await gradients.run({
            ...feeds,
            seed: new NODE.Tensor("float32", weights, [1, weights.length]),
          });
          const again = results["whole"]!.data as Float32Array;
          const largest = answers.reduce((most, value) => Math.max(most, Math.abs(value)), 1);
          const apart = answers.reduce((most, value, at) => Math.max(most, Math.abs(value - again[at]!)), 0) / largest;
          if (!(apart <= 1e-5)) throw new Error(`it answers ${[...again]} instead of ${[...answers]}`);
          for (const [i, { dims }] of one.inputs.entries()) {
            if (!dims) continue;
            const gradient = results[`dx${i}`]!;
            const { data: values, dims: size } = given.get(`x${i}`)!;
            if (gradient.dims.join() !== size.join())
              throw new Error(`x${i} is [${size}], its gradient [${gradient.dims}]`);
            const expected = new Float64Array(values.length);
            for (let at = 0; at < values.length; at++) {
              const shifted = async (by: number): Promise<number> => {
                const moved = Float32Array.from(values as Float32Array);
                moved[at]! += by;
                feeds[`x${i}`] = new NODE.Tensor("float32", moved, [...size]);
                return loss();
              };
              const slope = async (step: number): Promise<number> =>
                ((await shifted(step)) - (await shifted(-step))) / (2 * step);
              // Two steps cancel the error of second order.
              expected[at] = (4 * (await slope(STEP / 2)) - (await slope(STEP))) / 3;
            }
            feeds[`x${i}`] = tensor(NODE, given.get(`x${i}`)!);
            // Gradients that cancel out are small differences of large numbers: relative to 1 then.
            const norm = Math.max(1, Math.hypot(...expected));
            const off = Math.hypot(...expected.map((value, at) => value - (gradient.data as Float32Array)[at]!)) / norm;
            const told = `${[...(gradient.data as Float32Array)]} instead of ${[...expected]}`;
            if (!(off <= TOLERANCE)) throw new Error(`the gradient of x${i} [${size}] is off by ${off}: ${told}`);
            worst = Math.max(worst, off);
          }
        } finally {
          await session.release();
          await gradients.release();
        }
      },
    );
    await fc.assert(property, { seed: 20261123, numRuns: runs(48) });
    t.pass(`off by ${worst.toExponential(1)} at most`);
  });
}

t.test("weights in blocks: no rows, and what is left alone", async (t) => {
  const scales = floats([1, 2, 3, 4, 5], [5, 1]);
  const attributes = { K: 16, N: 5, bits: 4, block_size: 16 };
  const packed: Input[] = [{ dims: ["n", 16] }, { constant: bytes(1, 5, 1, 8) }, { constant: scales }];
  for (const untold of [false, true]) {
    const one: Case = { opset: 17, inputs: packed, attributes, untold };
    const feeds = PROBED.map((sizes) => feedsOf(one, sizes, uniform(1)));
    const [, both] = await differentiated("com.microsoft.MatMulNBits", one, feeds);
    t.notOk(parseModel(both, "both").graph.proto.node.some(({ opType }) => opType === "MatMulNBits"));
    const session = await NODE.InferenceSession.create(both);
    const none = new NODE.Tensor("float32", new Float32Array(0), [0, 16]);
    const seed = new NODE.Tensor("float32", new Float32Array(0), [1, 0]);
    const results = await session.run({ x0: none, seed });
    t.same(results["whole"]!.dims.at(-1), 0);
    t.same(results["dx0"]!.dims, [0, 16]);
    await session.release();
  }
  const unpackedOf = (zeros: TensorProto | undefined, declared: boolean): GraphProto => {
    const inputs = ["x", "W", "scales", ...(zeros || declared ? ["zeros"] : [])];
    const node = [makeNode("MatMulNBits", "y", inputs, "y", attributes, "com.microsoft")];
    const graph = create("GraphProto", {
      name: "one",
      node,
      initializer: [bytes(1, 5, 1, 8)("W"), scales("scales")],
    });
    if (zeros) graph.initializer.push(zeros);
    graph.input.push(makeValue("x", 1, ["n", 16]), ...(declared ? [makeValue("scales", 1, [5, 1])] : []));
    flattenScales(indexGraph(graph, "one"));
    unpackProducts(indexGraph(graph, "one"), 17, () => 2);
    return graph;
  };
  const twins = create("GraphProto", {
    name: "twins",
    node: ["b", "", ""].map((bias, i) =>
      makeNode("MatMulNBits", `y${i}`, ["x", "W", "scales", "", "", bias], `y${i}`, attributes, "com.microsoft"),
    ),
    initializer: [bytes(1, 5, 1, 8)("W"), scales("scales"), floats([1, 2, 3, 4, 5], [5])("b")],
  });
  unpackProducts(indexGraph(twins, "twins"), 17, () => 2);
  const made = twins.node.flatMap(({ output }) => output);
  t.equal(new Set(made).size, made.length);
  t.same(
    ["y0", "y1", "y2"].filter((value) => !made.includes(value)),
    [],
    "the same product again has its own name",
  );
  const products = ({ node }: GraphProto): number => node.filter(({ opType }) => opType === "MatMulNBits").length;
  const half: TensorProto = { ...makeFloats("zeros", [], []), dataType: 10, dims: [5n], rawData: new Uint8Array(10) };
  t.equal(products(unpackedOf(half, false)), 1, "zeros in f16");
  t.equal(products(unpackedOf(undefined, true)), 1, "zeros that another node makes");
  t.equal(products(unpackedOf(floats([8, 8, 8, 8, 8], [5])("zeros"), false)), 1, "zeros that are floats");
  const declared = unpackedOf(bytes(2, 5)("zeros"), true);
  t.equal(products(declared), 0);
  const dims = (graph: GraphProto) => graph.initializer.find(({ name }) => name === "scales")!.dims.join();
  t.equal(dims(declared), "5,1", "the shape of an input stays");
  t.equal(dims(unpackedOf(half, false)), "5");
});

t.test("equal maxima share a gradient", async (t) => {
  const one: Case = { opset: 17, inputs: [{ dims: ["n", "m"] }], attributes: { axes: [1], keepdims: 0 } };
  const [, both] = await differentiated(
    "ReduceMax",
    one,
    PROBED.map((sizes) => feedsOf(one, sizes, uniform(1))),
  );
  const session = await NODE.InferenceSession.create(both);
  const x = new NODE.Tensor("float32", Float32Array.of(1, 3, 3, 0, 2, 2, 2, 2), [2, 4]);
  const results = await session.run({ x0: x, seed: new NODE.Tensor("float32", Float32Array.of(1, 8), [1, 2]) });
  t.same([...(results["dx0"]!.data as Float32Array)], [0, 0.5, 0.5, 0, 2, 2, 2, 2]);
  await session.release();
});

t.test("uses of an operator that gradients do not pass", async (t) => {
  const use = (op: string, inputs: Case["inputs"], message: RegExp, rest: Partial<Case> = {}) => ({
    op,
    one: { opset: 17, inputs, ...rest },
    message,
  });
  const packed: Case["inputs"] = [
    { dims: ["n", 16] },
    { constant: bytes(1, 5, 1, 8) },
    { constant: floats([1, 1, 1, 1, 1], [5]) },
  ];
  const nbits = { K: 16, N: 5, bits: 4, block_size: 16 };
  const fixed = (...values: number[]): Input => ({ constant: ints(values) });
  const uses = [
    use(
      "Pow",
      [{ dims: ["n"], values: "positive" }, { dims: [] }],
      /Pow has a trained exponent, which gradients do not flow to: "Pow"/,
    ),
    use("Gather", [{ dims: [4, "n", 2] }, fixed(0, 2)], /Gather takes several places at once.*: "Gather"/),
    use("Slice", [{ dims: [6] }, fixed(0), fixed(6), fixed(0), fixed(2)], /Slice takes steps other than 1: "Slice"/),
    use(
      "ReduceSum",
      [{ dims: ["n", 2] }, { index: { rank: 1, value: () => 1 } }],
      /ReduceSum reduces over axes that depend on the input: "ReduceSum"/,
    ),
    use(
      "LayerNormalization",
      [{ dims: ["n", 4] }, { dims: [4] }],
      /is used by more than its first output.*: "LayerNormalization"/,
      { outputs: 2, used: [1] },
    ),
    use(
      "com.microsoft.MatMulNBits",
      [
        ...packed,
        { absent: true },
        { constant: (name) => ({ ...makeInts(name, []), dataType: 6, dims: [16n], rawData: new Uint8Array(64) }) },
      ],
      /MatMulNBits has its columns in another order \(g_idx\), which gradients do not pass/,
      { attributes: nbits },
    ),
  ];
  for (const { op, one, message } of uses) {
    const feeds = PROBED.map((sizes) => feedsOf(one, sizes, uniform(1)));
    await t.rejects(differentiated(op, one, feeds), { tag: "format", message }, op);
  }
});
