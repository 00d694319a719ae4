/**
 * Training graphs: gradients against PyTorch's on plain exports of several exporters, every operator's rule against finite
 * differences, what is refused and how.
 */
import t from "tap";
import type { GraftHead } from "../dist/src/onnx/graft.js";
import { buildTrainingGraph } from "../dist/src/learn/graph.js";
import { Layers } from "../dist/src/learn/layers.js";
import { CASES, golden, headOf, namesByOrder, probeOf, readCase, relative, sessionOf, tensor, type Case, type Tensors } from "./learning.ts";
import { NODE, ORTS, type Ort } from "./sessions.ts";

const TOLERANCE = 2e-5;

/** The largest of the relative differences of all gradients, and the loss's. */
async function against(ort: Ort, level: "disabled" | "all", of: Case): Promise<{ loss: number; gradients: number; worst: string }> {
  const file = await readCase(of.name);
  const layers = new Layers(file.model);
  const names = of.name.endsWith("dynamo") ? namesByOrder(file, of.modules.keys()) : undefined;
  const modules = [...of.modules].map(([module, { rank }]) => ({ ...layers.find(module, names), factors: rank }));
  const head = of.head && (await headOf(file, of.head));
  const heads: GraftHead[] = of.head ? [layers.findHead(of.head)] : [];
  const probe = probeOf(NODE);
  const graph = await buildTrainingGraph(file, { modules, heads }, { probe });
  const session = await sessionOf(ort, file, graph, level);
  try {
    const feeds: Tensors = {};
    for (const [name, feed] of of.feeds) feeds[name] = tensor(ort, feed);
    const parameters = new Float32Array(graph.size);
    for (const { module, kind, offset } of graph.parameters) parameters.set(of.modules.get(module)![kind as "A" | "B"], offset);
    feeds[graph.parametersInput!] = new ort.Tensor("float32", parameters, [graph.size]);
    feeds[graph.targetsInput] = tensor(ort, of.targets);
    for (const { weight, bias } of graph.heads) {
      const { weight: W, bias: b, out, in: inputs } = head as Exclude<typeof head, undefined | "">;
      feeds[weight] = new ort.Tensor("float32", W, [out, inputs]);
      feeds[bias!] = new ort.Tensor("float32", b, [out]);
    }
    const results = await session.run(feeds);
    const values = (name: string): Float32Array => results[name]!.data as Float32Array;
    const found = new Map<string, Float32Array>();
    for (const { module, kind, dims: [rows, columns], offset } of graph.parameters) {
      const gradient = values(graph.gradientOutput!).subarray(offset, offset + rows * columns);
      if (kind === "A") found.set(`${module}.lora_A.weight`, gradient);
      else {
        // lora_B is [out, r], and the graph's B is its transpose times the scale.
        const { scale } = of.modules.get(module)!;
        found.set(`${module}.lora_B.weight`, Float32Array.from(gradient, (_, i) => scale * gradient[(i % rows) * columns + Math.floor(i / rows)]!));
      }
    }
    for (const { module, weightGradient, biasGradient } of graph.heads) {
      found.set(`${module}.weight`, values(weightGradient));
      found.set(`${module}.bias`, values(biasGradient!));
    }
    let [largest, worst] = [0, ""];
    for (const [name, expected] of of.gradients) {
      const off = relative(found.get(name) ?? [], expected);
      if (off > largest) [largest, worst] = [off, name];
    }
    return { loss: Math.abs(values(graph.lossOutput)[0]! - of.loss) / of.loss, gradients: largest, worst };
  } finally {
    await session.release();
  }
}

t.test("loss and gradients are PyTorch's", async (t) => {
  t.ok(CASES.length >= 12, "the cases are there");
  for (const name of CASES) {
    const of = await golden(name);
    for (const { name: runtime, ort } of ORTS) {
      for (const level of ["disabled", "all"] as const) {
        const { loss, gradients, worst } = await against(ort, level, of);
        const what = `${name}, ${runtime}, optimisations ${level}`;
        t.ok(loss <= TOLERANCE, `${what}: loss off by ${loss.toExponential(1)}`);
        t.ok(gradients <= TOLERANCE, `${what}: gradients off by ${gradients.toExponential(1)} at most (${worst})`);
      }
    }
  }
});
