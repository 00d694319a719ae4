/** Shared by tests that make ONNX models, or change those of test/data. */
import { create, fromBinary, type GraphProto, type ModelProto, toBinary } from "./internals/models.ts";

/** The model after a change to its graph. */
export function changed(bytes: Uint8Array, change: (graph: GraphProto, model: ModelProto) => void): Uint8Array {
  const model = fromBinary("ModelProto", bytes);
  change(model.graph!, model);
  return toBinary("ModelProto", model);
}

/** A model of a graph, with the operators of ONNX and of com.microsoft. */
export function modelOf(graph: Partial<GraphProto>, { opset = 17 } = {}): Uint8Array<ArrayBuffer> {
  const opsetImport = [
    { domain: "", version: BigInt(opset) },
    { domain: "com.microsoft", version: 1n },
  ];
  const irVersion = opset > 20 ? 10n : 8n;
  const whole = create("GraphProto", { name: "made", ...graph });
  return toBinary("ModelProto", create("ModelProto", { irVersion, opsetImport, graph: whole })).slice();
}
