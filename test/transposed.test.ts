/** Products with the transpose of a constant weight: computed from the weight as stored, with the same answers. */
import t from "tap";
import {
  create,
  f32ToF16,
  type GraphProto,
  indexGraph,
  ModelProtoSchema,
  makeFloats,
  makeNode,
  makeValue,
  type NodeProto,
  TensorProtoSchema,
  takeUntransposed,
  toBinary,
  type ValueInfoProto,
} from "./internals.ts";
import { noise, relative } from "./learning.ts";
import { NODE } from "./sessions.ts";

const [FLOAT, HALF] = [1, 10];
const [ROWS, COLUMNS] = [5, 4];
const WEIGHT = noise(ROWS * COLUMNS, 1);
const X = noise(2 * 3 * COLUMNS, 2);

const HALVES = create(TensorProtoSchema, {
  name: "W",
  dims: [BigInt(ROWS), BigInt(COLUMNS)],
  dataType: HALF,
  rawData: new Uint8Array(Uint16Array.from(WEIGHT, f32ToF16).buffer),
});
const TURN = makeNode("Transpose", "turn", ["W"], "turned", { perm: [1, 0] });
const PRODUCT = makeNode("MatMul", "product", ["x", "turned"], "y");

interface Case {
  readonly nodes: readonly NodeProto[];
  readonly half?: boolean;
  readonly outputs?: readonly ValueInfoProto[];
  /** Whether the Transpose is removed. */
  readonly gone: boolean;
}

const CASES: Readonly<Record<string, Case>> = {
  "one product": { nodes: [TURN, PRODUCT], gone: true },
  "two products": {
    nodes: [TURN, PRODUCT, makeNode("MatMul", "again", ["x", "turned"], "z"), makeNode("Add", "sum", ["y", "z"], "s")],
    outputs: [makeValue("s", FLOAT)],
    gone: true,
  },
  "a weight in f16": {
    nodes: [
      makeNode("Cast", "cast", ["W"], "wide", { to: FLOAT }),
      makeNode("Transpose", "turn", ["wide"], "turned", { perm: [1, 0] }),
      PRODUCT,
    ],
    half: true,
    gone: true,
  },
  "what is an output too": { nodes: [TURN, PRODUCT], outputs: [makeValue("turned", FLOAT)], gone: false },
  "what something else reads": {
    nodes: [TURN, PRODUCT, makeNode("Neg", "other", ["turned"], "z")],
    outputs: [makeValue("z", FLOAT)],
    gone: false,
  },
  "what stands in front": {
    nodes: [
      TURN,
      PRODUCT,
      makeNode("Transpose", "swap", ["y"], "columns", { perm: [0, 2, 1] }),
      makeNode("MatMul", "front", ["turned", "columns"], "z"),
    ],
    outputs: [makeValue("z", FLOAT)],
    gone: false,
  },
};

function modelOf({ nodes, half, outputs = [] }: Case): { bytes: () => Uint8Array<ArrayBuffer>; graph: GraphProto } {
  const proto = create(ModelProtoSchema, {
    irVersion: 8n,
    opsetImport: [{ domain: "", version: 17n }],
    graph: {
      name: "graph",
      node: structuredClone(nodes) as NodeProto[],
      initializer: [half ? HALVES : makeFloats("W", Array.from(WEIGHT), [ROWS, COLUMNS])],
      input: [makeValue("x", FLOAT, ["batch", "length", COLUMNS])],
      output: [makeValue("y", FLOAT), ...outputs],
    },
  });
  return { bytes: () => toBinary(ModelProtoSchema, proto), graph: proto.graph! };
}

async function answersOf(bytes: Uint8Array): Promise<Map<string, { dims: readonly number[]; data: Float32Array }>> {
  const session = await NODE.InferenceSession.create(bytes, { graphOptimizationLevel: "disabled" });
  const results = await session.run({ x: new NODE.Tensor("float32", Float32Array.from(X), [2, 3, COLUMNS]) });
  await session.release();
  return new Map(Object.entries(results).map(([name, { dims, data }]) => [name, { dims, data: data as Float32Array }]));
}

t.test("answers and shapes stay, and the transpose goes where products alone read it", async (t) => {
  for (const [what, one] of Object.entries(CASES)) {
    const { bytes, graph } = modelOf(one);
    const before = await answersOf(bytes());
    takeUntransposed(indexGraph(graph, what), 17);
    t.equal(!graph.node.some(({ name }) => name === "turn"), one.gone, what);
    const after = await answersOf(bytes());
    for (const [name, { dims, data }] of before) {
      t.same(after.get(name)!.dims, dims, `${what}: ${name} [${dims}]`);
      t.ok(relative(after.get(name)!.data, data) < 1e-6, `${what}: ${name}`);
    }
  }
});
