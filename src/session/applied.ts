/** Where a model applies the weight of an adapted module: as a linear layer, or as one of the forms that are loaded on demand. */
import type { PackModule } from "../format/format.ts";
import type { GraftModule } from "../onnx/adapted.ts";
import { linearsOf, NotLinear } from "../onnx/linear.ts";
import type { OnnxModel } from "../onnx/model.ts";
import type { OnnxParameter } from "../onnx/modules.ts";

/** @returns the reason where it cannot be added to */
export async function appliedAs(
  model: OnnxModel,
  { name, layout }: PackModule,
  parameter: OnnxParameter,
  rowScale: boolean,
): Promise<Pick<GraftModule, "linears" | "form"> | string> {
  const linears = linearsOf(model, parameter);
  if (!(linears instanceof NotLinear)) {
    const shared = rowScale && (parameter.slice ?? parameter.joined) && linears.some(({ addsBias }) => addsBias);
    return shared ? `"${name}" has DoRA tasks, and its layer is packed or divided together with its bias` : { linears };
  }
  const isForm = layout === "conv" || layout === "embedding";
  const form = isForm ? (await import("../onnx/forms.ts")).formOf(model, parameter) : linears.reason;
  if (typeof form === "string") return `"${name}" cannot be added to: ${form}`;
  if (rowScale && form.places.some(({ op, node }) => op !== node))
    return `"${name}" has DoRA tasks, and what its layer makes is quantised`;
  return { linears: [], form };
}
