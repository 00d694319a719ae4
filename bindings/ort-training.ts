/**
 * What a session of onnxruntime needs to learn beside answering: a training graph in the same model, and a way for a trainer to
 * run it. Loaded when a session is made `trainable`.
 */
import { buildTrainingGraph, type TrainingGraph } from "../src/autodiff/graph.ts";
import type { ShapeProbe } from "../src/autodiff/shapes.ts";
import type { Grafted, TaskInput } from "../src/onnx/graft.ts";
import type { ModelFile } from "../src/onnx/read.ts";
import type { InputValue } from "../src/session/values.ts";
import { call, inTurn, makeTensor, type Ort, type OrtTensor, onWebgpu } from "./ort.ts";
import { createSession, type Parts } from "./ort-carrier.ts";

/** What a session that can learn lends to a trainer. */
export interface Trainable<O extends Ort> {
  readonly ort: O;
  readonly graph: TrainingGraph;
  /** The inputs that carry a task. */
  readonly inputs: readonly TaskInput[];
  /** Their values on the base. */
  base(): Promise<ReadonlyMap<string, InputValue>>;
  /** Runs the model on inputs that are all given, between the session's own runs. */
  run(
    feeds: Readonly<Record<string, OrtTensor>>,
    fetches: readonly string[],
  ): Promise<Readonly<Record<string, OrtTensor>>>;
}

export interface Training<O extends Ort> {
  readonly graph: TrainingGraph;
  /** Options of the session. */
  readonly session: Parts<O>["options"]["session"];
  /** What every run is fed with that does not learn. */
  readonly idle: Readonly<Record<string, OrtTensor>>;
}

/**
 * Adds loss and gradients to a model that was grafted.
 * @throws FormatError naming every node that gradients do not pass
 */
export async function addTraining<O extends Ort>(
  parts: Pick<Parts<O>, "ort"> & { options: Parts<O>["options"] & { readonly logits?: string | undefined } },
  file: ModelFile,
  grafted: Grafted,
): Promise<Training<O>> {
  const graph = await buildTrainingGraph(file, grafted, { probe: probeOf(parts), logits: parts.options.logits });
  const idle = {
    [graph.learnInput]: boolean(parts.ort, false),
    [graph.targetsInput]: makeTensor(parts.ort, new Float32Array(1), [1, 1]),
  };
  const turning = file.model.graph.proto.node.filter(
    ({ opType, name }) => (opType === "Sin" || opType === "Cos") && name !== "",
  );
  // Patterns of memory are worth little to lengths that change, and each is memory of its own beside what was there.
  const session = {
    enableMemPattern: false,
    ...(parts.options.session as object | undefined),
  } as Parts<O>["options"]["session"];
  return {
    graph,
    idle,
    session: onCpu(
      session,
      turning.map(({ name }) => name),
    ),
  };
}

/**
 * Keeps nodes from WebGPU. WGSL promises sine and cosine to 2⁻¹¹, too little for gradients; they turn positions, a few numbers, and
 * go to the device when that is done. Only onnxruntime-web's newer provider knows of it, the older one (jsep) reads past it.
 */
export function onCpu<S>(session: S, nodes: readonly string[]): S {
  if (!onWebgpu(session) || nodes.length === 0) return session;
  const given = session as {
    readonly executionProviders: readonly (
      | string
      | { readonly name: string; readonly forceCpuNodeNames?: readonly string[] }
    )[];
  };
  const executionProviders = given.executionProviders.map((one) => {
    const provider = typeof one === "string" ? { name: one } : one;
    return provider.name === "webgpu"
      ? { ...provider, forceCpuNodeNames: [...(provider.forceCpuNodeNames ?? []), ...nodes] }
      : one;
  });
  return { ...given, executionProviders } as S;
}

/** A scalar of the type bool. */
export function boolean(ort: Ort, value: boolean): OrtTensor {
  const Tensor = ort.Tensor as unknown as new (...of: unknown[]) => OrtTensor;
  return new Tensor("bool", Uint8Array.of(Number(value)), []);
}

/** The values of a tensor, wherever it is. */
export async function dataOf(tensor: OrtTensor): Promise<unknown> {
  return tensor.getData ? tensor.getData() : tensor.data;
}

/**
 * Looks at shapes with the caller's runtime: without the optimiser, which needs longer than two tiny runs, and on the CPU, since
 * shapes are the same there, and WebGPU would compile shaders for each operator, of which devices without f16 lack some.
 */
function probeOf<O extends Ort>({ ort, options }: Pick<Parts<O>, "ort" | "options">): ShapeProbe {
  return async (model, feeds) => {
    const { executionProviders, preferredOutputLocation, ...given } = (options.session ?? {}) as Record<
      string,
      unknown
    >;
    const asked = { ...given, graphOptimizationLevel: "disabled" };
    const session = await createSession({ ort, options: { ...options, session: asked as never } }, model);
    try {
      const results = [];
      for (const feed of feeds) {
        const tensors: Record<string, OrtTensor> = {};
        for (const name of session.inputNames)
          tensors[name] = makeTensor(ort, feed.get(name)!.data, feed.get(name)!.dims);
        const found = (await inTurn(ort, () => call(session, tensors, session.outputNames, {}))) as Record<
          string,
          OrtTensor
        >;
        const entries = Object.entries(found).map(
          async ([name, tensor]) =>
            [name, { type: tensor.type, dims: tensor.dims, data: await dataOf(tensor) }] as const,
        );
        results.push(Object.fromEntries(await Promise.all(entries)));
      }
      return results;
    } finally {
      await inTurn(ort, () => session.release());
    }
  };
}
