/** Whether a model can be grafted: asked before anything is added to it. */
import { FormatError } from "../errors.ts";
import type { OnnxModel } from "./model.ts";
import { PREFIX } from "./nodes.ts";

/** The least opset in which the operators that are added mean what is meant here. */
const LEAST_OPSET = 11;

/**
 * To be asked of a model as its file has it, before anything is added: no name of ours can be told from the file's own afterwards.
 * @throws FormatError when the model's opset is too old, the model has been grafted before, or it uses names of ours
 */
export function checkGraftable(model: OnnxModel): void {
  if (model.opset < LEAST_OPSET) {
    const message = `opset ${model.opset}: at least ${LEAST_OPSET} is needed; export it again with opset_version=17`;
    throw new FormatError(message, { file: model.name, part: "opset" });
  }
  if (model.graph.proto.input.some(({ name }) => name.startsWith(`${PREFIX}.`))) {
    throw new FormatError("has task inputs already; pass the model as it was before", {
      file: model.name,
      part: "graph",
    });
  }
  const taken = ownNames(model).find((name) => name.startsWith(`${PREFIX}/`) || name.startsWith(`${PREFIX}.`));
  if (taken === undefined) return;
  // What is added would be taken for it, or it for what is added.
  const message = `its value "${taken}" has a name as this package gives them: rename it, or pass the model as it was before`;
  throw new FormatError(message, { file: model.name, part: "graph" });
}

/** All names of values. */
function ownNames({ graph }: OnnxModel): string[] {
  const inputs = [...graph.scopes.keys()].flatMap(({ input }) => input.map(({ name }) => name));
  const made = [...graph.scopes.values()].flatMap(({ initializers, producers, outputs }) => [
    ...initializers.keys(),
    ...producers.keys(),
    ...outputs,
  ]);
  return [...inputs, ...made, ...graph.consumers.keys()];
}
