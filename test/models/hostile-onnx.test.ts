/**
 * Small ONNX files that ask for much work: files may contain many, long or deep names, and work must not grow with
 * their square. Each ends in one of our errors or in a working session, long before a limit that quadratic work would
 * miss by far.
 */
import { EigenLoraError } from "eigenlora";
import t, { type Test } from "tap";
import { changed } from "../support/graphs.ts";
import {
  create,
  type GraphProto,
  makeFloats,
  makeInts,
  makeNode,
  makeValue,
  type NodeProto,
} from "../support/internals/models.ts";
import {
  difference,
  feeds,
  golden,
  modelBytes,
  NODE,
  type Options,
  open,
  outputOf,
  packFor,
} from "../support/sessions.ts";

/** Milliseconds for one session. The machine may be slow; quadratic work took more than a minute. */
const LIMIT = 15_000;
const FLOAT = 1;

/** The MLP of the sessions' tests with additions. */
const gemm = (change: (graph: GraphProto) => void): Uint8Array => changed(modelBytes("gemm"), change);

const WAYS: readonly Options[] = [{ mode: "core" }, { mode: "factors" }, { mode: "folded" }, { trainable: true }];

/** Checks that each way ends in time, in a session with right answers or one of our errors. */
async function ends(t: Test, bytes: Uint8Array, works: boolean, ways: readonly Options[] = WAYS): Promise<void> {
  for (const options of ways) {
    const pack = await packFor("mlp");
    const what = JSON.stringify(options);
    const started = performance.now();
    try {
      const session = await open(NODE, bytes, pack, options);
      await session.switchTask("a");
      if (works) t.ok(difference(await outputOf(session, feeds(NODE, session)), golden("mlp", "a")) <= 1e-5, what);
      await session.close();
    } catch (error) {
      t.ok(error instanceof EigenLoraError, `${what}: ${(error as Error).message.slice(0, 200)}`);
      if (works) t.match(error, { message: /training graph/ }, what);
    }
    const took = performance.now() - started;
    t.ok(took < LIMIT, `${what}: ${took.toFixed(0)} ms`);
  }
}

t.test("an input of very many elements", async (t) => {
  const bytes = gemm((graph) => {
    graph.input.push(makeValue("huge", FLOAT, [10_000, 10_000]));
    graph.node.push(makeNode("Identity", "huge", ["huge"], "huger"));
    graph.output.push(makeValue("huger", FLOAT));
  });
  const before = process.memoryUsage().arrayBuffers;
  for (const mode of ["core", "factors", "folded"] as const) {
    const session = await open(NODE, bytes, await packFor("mlp"), { mode });
    if (mode !== "folded") t.match(session.probe.result, /^skipped: .*pass `probe: feeds`/);
    await session.close();
  }
  t.ok(process.memoryUsage().arrayBuffers - before < 50e6, "and nothing of the kind is allocated");
  await ends(t, bytes, false);
});

t.test("impossible dimensions of inputs", async (t) => {
  for (const dim of [-1, -5, 2 ** 40]) {
    await ends(
      t,
      gemm((graph) => {
        graph.input.push(makeValue("odd", FLOAT, [dim, 3]));
        graph.node.push(makeNode("Identity", "odd", ["odd"], "odder"));
        graph.output.push(makeValue("odder", FLOAT));
      }),
      false,
    );
  }
});

t.test("nodes that nothing uses", async (t) => {
  const chain = gemm((graph) => {
    for (let i = 0; i < 30_000; i++)
      graph.node.push(makeNode("Identity", `u${i}`, [i === 0 ? "x" : `u${i - 1}`], `u${i}`));
  });
  await ends(t, chain, true);
});

t.test("a weight that very many nodes use", async (t) => {
  const used = (nameOf: (i: number) => string) =>
    gemm((graph) => {
      const weight = graph.node.find(({ name }) => name === "/mid/Gemm")!.input[1]!;
      const size = Number(graph.initializer.find(({ name }) => name === weight)!.dims[0]);
      graph.initializer.push(makeFloats("rows", Array(size).fill(0), [1, size]));
      for (let i = 0; i < 5000; i++) graph.node.push(makeNode("MatMul", nameOf(i), ["rows", weight], `m${i}`));
    });
  await ends(
    t,
    used((i) => `/m.${i}/MatMul`),
    true,
  );
  await ends(
    t,
    used((i) => `/mid_${i}/MatMul`),
    true,
  );
});

t.test("very many weights that claim one name", async (t) => {
  const bytes = gemm((graph) => {
    graph.initializer.push(makeFloats("rows", [0, 0, 0, 0], [1, 4]));
    for (let i = 0; i < 5000; i++) {
      graph.initializer.push(makeFloats(`val_${i}`, [i, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0], [4, 4]));
      graph.node.push(makeNode("MatMul", "/other/MatMul", ["rows", `val_${i}`], `m${i}`));
    }
  });
  await ends(t, bytes, true);
});

t.test("long names", async (t) => {
  const odd = [`w${"_fp16".repeat(20_000)}`, "a.".repeat(50_000), `m${"_1".repeat(30_000)}.weight`];
  for (const name of odd) {
    const bytes = gemm((graph) => {
      graph.initializer.push(makeFloats(name, [0], [1]));
      graph.node.push(makeNode("Add", `/${name.replaceAll(".", "/")}/Add`, [name, name], "odd"));
      graph.output.push(makeValue("odd", FLOAT));
    });
    await ends(t, bytes, true);
  }
});

t.test("long chains", async (t) => {
  const identities = (from: string, to: (name: string) => void, graph: GraphProto, at: number): void => {
    const chain: NodeProto[] = [];
    for (let i = 0; i < 20_000; i++) chain.push(makeNode("Identity", `i${i}`, [i === 0 ? from : `i${i - 1}`], `i${i}`));
    graph.node.splice(at, 0, ...chain);
    to("i19999");
  };
  const before = gemm((graph) => {
    const first = graph.node.find(({ input }) => input[0] === "x")!;
    identities("x", (name) => (first.input[0] = name), graph, 0);
  });
  await ends(t, before, true, WAYS.slice(0, 3));
  const weight = gemm((graph) => {
    const mid = graph.node.find(({ name }) => name === "/mid/Gemm")!;
    identities(mid.input[1]!, (name) => (mid.input[1] = name), graph, 0);
  });
  await ends(t, weight, false);
  const shapes = gemm((graph) => {
    const concats: NodeProto[] = [];
    for (let i = 0; i < 20_000; i++)
      concats.push(
        makeNode("Concat", `c${i}`, i === 0 ? ["one", "one"] : [`c${i - 1}`, `c${i - 1}`], `c${i}`, { axis: 0 }),
      );
    graph.initializer.push(makeInts("one", [1]));
    const first = graph.node.find(({ input }) => input[0] === "x")!;
    graph.node.unshift(...concats, makeNode("Reshape", "reshaped", ["x", "c19999"], "reshaped"));
    first.input[0] = "reshaped";
  });
  await ends(t, shapes, false);
});

t.test("graphs in graphs", async (t) => {
  const nested = (depth: number): GraphProto => {
    let inner = create("GraphProto", { name: "g", output: [makeValue("x", FLOAT)] });
    for (let i = 0; i < depth; i++) {
      const node = makeNode("If", `if${i}`, ["deep"], `n${i}`, { then_branch: inner, else_branch: inner });
      // Following each branch would take two to the power of the depth.
      node.attribute.length = 1;
      inner = create("GraphProto", { name: "g", node: [node], output: [makeValue(`n${i}`, FLOAT)] });
    }
    return inner;
  };
  for (const depth of [30, 70, 300]) {
    const bytes = gemm((graph) => {
      graph.node.push(makeNode("If", "outer", ["deep"], "outer", { then_branch: nested(depth) }));
    });
    await ends(t, bytes, false);
  }
});
